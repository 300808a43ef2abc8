"""AMX's tiles for bfloat16 weights: emulated on any CPU, bit by bit against the CPU's own; permission to use them."""

import ctypes
import errno
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import cpu_kernels as ck
from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.format.layout import block_bytes
from cpu_kernels.format.pack import pack_matrix
from cpu_kernels.host import isa
from cpu_kernels.simd.amx import TILE_ROWS
from cpu_kernels.simd.compile import Target, assembly, kernel_address
from cpu_kernels.simd.formats import PARTS, Format
from cpu_kernels.simd.rows import PrepareKernel
from cpu_kernels.simd.tiles import PanelKernel

AMX = isa.BY_NAME["amx"]
HAVE = isa.cpu_features()
LACKS = isa.missing_features(AMX, HAVE)
needs_amx = pytest.mark.skipif(bool(LACKS), reason=f"this CPU or its system lacks {', '.join(LACKS)}")
needs_avx2 = pytest.mark.skipif("fma" not in HAVE or "avx2" not in HAVE, reason="this CPU lacks AVX2")
WAYS = [pytest.param(False, id="tiles", marks=needs_amx), pytest.param(True, id="emulated", marks=needs_avx2)]
COLUMNS = 192
BLOCKS = COLUMNS // 64
POINTER, INT64 = ctypes.c_void_p, ctypes.c_int64
PANEL = ctypes.CFUNCTYPE(None, POINTER, INT64, INT64, POINTER, INT64, POINTER, INT64, POINTER)


def bits(x: np.ndarray) -> np.ndarray:
    """The bits of float32; those of all NaN are the same."""
    return np.where(np.isnan(x), np.uint32(0x7FC00000), np.ascontiguousarray(x).view(np.uint32))


def split(x: np.ndarray) -> np.ndarray:
    """Split blocks uint8 [n, BLOCKS * block bytes] of float32 [n, COLUMNS]."""
    kernel = PrepareKernel(Format("split"))
    path = "avx2" if "avx2" in HAVE else "portable"
    write = ctypes.CFUNCTYPE(INT64, POINTER, INT64, POINTER)(kernel_address(kernel, path))
    blocks = np.zeros((len(x), BLOCKS * kernel.form.block_bytes), np.uint8)
    for row, target in zip(x, blocks, strict=True):
        write(row.ctypes.data, COLUMNS, target.ctypes.data)
    return blocks


def packed(weights: np.ndarray) -> np.ndarray:
    """A record of bfloat16 weights [64, COLUMNS]."""
    record = torch.zeros(4 * BLOCKS * block_bytes("bfloat16"), dtype=torch.uint8)
    pack_matrix(torch.from_numpy(weights), "bfloat16", "test", record)
    return record.numpy()


def products(kernel: PanelKernel, weights: np.ndarray, blocks: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """float32 [tokens, 64]: products of weights [64, COLUMNS] with the rows of blocks, by one call of the kernel."""
    record, out = packed(weights), np.zeros((len(ids), 64), np.float32)
    row_bytes = BLOCKS * block_bytes("bfloat16")
    PANEL(kernel_address(kernel, "amx"))(
        record.ctypes.data, row_bytes, BLOCKS, blocks.ctypes.data, blocks.shape[1], ids.ctypes.data, len(ids),
        out.ctypes.data,
    )  # fmt: skip
    return out


def rounded(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.astype(np.float32)).bfloat16().float().numpy()


def values(kind: str, n: int, seed: int) -> np.ndarray:
    """bfloat16 values float32 [n, COLUMNS]; no sum or product of two of them is subnormal, except by cancelling."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, COLUMNS))
    if kind == "wide":
        x *= 2.0 ** random.integers(-40, 40, x.shape)
    elif kind == "cancelling":
        x[:, 1::2] = -x[:, ::2] * (1 + 2.0**-7 * random.integers(0, 2, x[:, ::2].shape))
    elif kind == "huge":
        x *= 2.0 ** random.integers(0, 100, x.shape)
    elif kind == "special":
        x[random.random(x.shape) < 0.01] = np.inf
        x[random.random(x.shape) < 0.005] = np.nan
    return rounded(x)


KINDS = ("plain", "wide", "cancelling", "huge", "special")
IDS = np.random.default_rng(0).permutation(37).astype(np.int32)
COUNTS = [1, 2, TILE_ROWS - 1, TILE_ROWS, TILE_ROWS + 1, 2 * TILE_ROWS, 37]


@needs_amx
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [False, True])
def test_tiles_add_in_the_order_of_their_emulation(kind: str, pairs: bool) -> None:
    """Bit by bit, with values of all sizes, and with what is not finite."""
    weights = values("plain" if kind == "special" else kind, 64, 1)  # records hold finite weights
    blocks = split(values(kind, 37, 2) if pairs else values(kind, 37, 2) * np.float32(1.0001))
    for n_tokens in COUNTS:
        tiles, emulated = (
            products(PanelKernel("bfloat16", pairs, emulate_dot=e), weights, blocks, IDS[:n_tokens])
            for e in (False, True)
        )
        assert np.array_equal(bits(tiles), bits(emulated))


@needs_amx
def test_tiles_take_subnormal_values_as_zero() -> None:
    x, weights = np.full((1, COLUMNS), 2.0**-130, np.float32), np.ones((64, COLUMNS), np.float32)
    assert not products(PanelKernel("bfloat16"), weights, split(x), IDS[:1] * 0).any()
    assert not products(PanelKernel("bfloat16"), x.repeat(64, 0), split(weights[:1]), IDS[:1] * 0).any()


@pytest.mark.parametrize("emulated", WAYS)
@pytest.mark.parametrize("pairs", [False, True])
def test_bits_do_not_depend_on_the_other_tokens(pairs: bool, emulated: bool) -> None:
    kernel, weights, blocks = (
        PanelKernel("bfloat16", pairs, emulated),
        values("plain", 64, 1),
        split(values("plain", 37, 2)),
    )
    together = bits(products(kernel, weights, blocks, IDS))
    for n_tokens in COUNTS:
        assert np.array_equal(bits(products(kernel, weights, blocks, IDS[:n_tokens])), together[:n_tokens])
    singles = [products(kernel, weights, blocks, IDS[i : i + 1])[0] for i in range(37)]
    assert np.array_equal(bits(np.stack(singles)), together)


@pytest.mark.parametrize("emulated", WAYS)
@pytest.mark.parametrize("kind", ["plain", "wide", "cancelling"])
def test_one_part_of_bfloat16_gives_the_bits_of_three(kind: str, emulated: bool) -> None:
    """So a token's result does not depend on whether all tokens of the call are bfloat16."""
    weights, blocks = values(kind, 64, 1), split(values(kind, 37, 2))
    one, three = (products(PanelKernel("bfloat16", p, emulated), weights, blocks, IDS) for p in (True, False))
    assert np.array_equal(bits(one), bits(three))


@pytest.mark.parametrize("emulated", WAYS)
def test_three_parts_are_as_exact_as_float32(emulated: bool) -> None:
    x = np.random.default_rng(4).standard_normal((37, COLUMNS)).astype(np.float32)
    weights = values("plain", 64, 3)
    expected = (x.astype(np.float64) @ weights.T.astype(np.float64))[IDS]
    found = products(PanelKernel("bfloat16", emulate_dot=emulated), weights, split(x), IDS)
    assert np.abs(found - expected).max() < 3e-7 * np.abs(expected).max()


@pytest.mark.parametrize("emulated", WAYS)
def test_infinite_activations_stay_infinite(emulated: bool) -> None:
    """As an activation that overflows gives them to down; not NaN, as float arithmetic."""
    x, weights = np.ones((2, COLUMNS), np.float32), np.abs(values("plain", 64, 3)) + np.float32(1)
    x[1, 7] = np.inf
    for pairs in (False, True):
        ones, infinite = products(
            PanelKernel("bfloat16", pairs, emulated), rounded(weights), split(x), np.arange(2, dtype=np.int32)
        )
        assert np.isfinite(ones).all()
        assert np.isposinf(infinite).all()


def layer(
    path: str, n_tokens: int, monkeypatch: pytest.MonkeyPatch, hidden: int = 160, inter: int = 224
) -> torch.Tensor:
    """Rows of one bfloat16 expert for some tokens."""
    monkeypatch.setenv(isa.ENV_ISA, path)
    generator = torch.Generator().manual_seed(3)
    gate, up, down = (
        torch.randn(*shape, generator=generator) * 0.1 for shape in [(inter, hidden)] * 2 + [(hidden, inter)]
    )
    spec = ck.ExpertSpec(hidden, inter, "bfloat16")
    record = np.zeros(spec.record_bytes, np.uint8)
    ck.pack_expert(spec, ck.ExpertWeights(up, down, gate), record)
    x = torch.randn(50, hidden, generator=generator).bfloat16().float()[:n_tokens].numpy()
    dispatch = ck.build_dispatch(np.zeros((n_tokens, 1), np.int64), np.ones((n_tokens, 1), np.float32), 1)
    out = np.zeros_like(x)
    backend = NumbaBackend(2)
    assert backend.choice.isa.name == path
    backend.run(spec, np.array([record.ctypes.data], np.uint64), np.zeros(1, np.int32), dispatch, x, out)
    return torch.from_numpy(out)


@needs_amx
def test_a_layer_on_tiles_agrees_with_one_on_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, vectors = (layer(path, 50, monkeypatch) for path in ("amx", "avx512bf16"))
    assert 0 < ck.relative_error(tiles, vectors) < 1e-6
    assert torch.equal(layer("amx", 3, monkeypatch), tiles[:3])


def test_assembly_for_sapphire_rapids() -> None:
    """Tiles are set up, used for all 64 rows of both halves of a block, and given back."""
    for pairs, parts in ((True, 1), (False, PARTS)):
        kernel = PanelKernel("bfloat16", pairs)
        text = assembly(kernel, AMX, Target("x86_64-unknown-linux-gnu", "sapphirerapids", ""))
        assert text.count("tdpbf16ps") == 8 * parts
        assert text.count("ldtilecfg") == text.count("tilerelease") == 1
    emulated = assembly(
        PanelKernel("bfloat16", emulate_dot=True), AMX, Target("x86_64-unknown-linux-gnu", "haswell", "")
    )
    assert "tile" not in "".join(line for line in emulated.splitlines() if line.startswith("\t"))


WITH_TILES = frozenset(AMX.features)


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, None), (errno.EINVAL, "older than Linux 5.16"), (errno.ENOSPC, "stack for signals"), (1, os.strerror(1))],
)
def test_tiles_need_permission(monkeypatch: pytest.MonkeyPatch, number: int, words: str | None) -> None:
    class Library:
        def syscall(self, *arguments: ctypes.c_long) -> int:
            assert [a.value for a in arguments] == [158, 0x1023, 18]
            return -1 if number else 0

    monkeypatch.setattr(isa.ctypes, "CDLL", lambda name, use_errno: Library())
    monkeypatch.setattr(isa.ctypes, "get_errno", lambda: number)
    monkeypatch.setattr(isa.sys, "platform", "linux")
    monkeypatch.setattr(isa, "_reported_features", lambda: WITH_TILES)
    isa.tile_refusal.cache_clear()
    isa.cpu_features.cache_clear()
    try:
        features, refusal = isa.cpu_features(), isa.tile_refusal()
        choice = isa.choose_isa(features, None, refusal)
        if words is None:
            assert (choice.isa.name, refusal) == ("amx", None)
            return
        assert choice.isa.name == "avx512bf16"
        assert refusal is not None
        assert words in refusal
        assert refusal in dict(choice.rejected)["amx"]
        with pytest.raises(ck.IsaError, match=r"HYBRIMOE_ISA=amx needs amx-tile, amx-bf16.*refused"):
            isa.choose_isa(features, "amx", refusal)
    finally:
        isa.tile_refusal.cache_clear()
        isa.cpu_features.cache_clear()


USE = """
import os, sys
import numpy as np
sys.path.insert(0, os.path.dirname({file!r}))
import test_amx
expected = test_amx.products(test_amx.PanelKernel("bfloat16"), test_amx.values("plain", 64, 1),
                             test_amx.split(test_amx.values("plain", 37, 2)), test_amx.IDS)
def same():
    found = test_amx.products(test_amx.PanelKernel("bfloat16"), test_amx.values("plain", 64, 1),
                              test_amx.split(test_amx.values("plain", 37, 2)), test_amx.IDS)
    return np.array_equal(found, expected)
child = os.fork()
if child == 0:
    os._exit(0 if same() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_amx
def test_a_child_by_fork_has_the_permission() -> None:
    """In a process of its own: forking this one, with its threads, is not what users do."""
    code = USE.format(file=os.path.abspath(__file__))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0"], result.stderr


@needs_amx
def test_threads_that_ran_before_have_the_permission() -> None:
    blocks, weights = split(values("plain", 37, 2)), values("plain", 64, 1)
    found: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: found.append(products(PanelKernel("bfloat16"), weights, blocks, IDS)))
    thread.start()
    thread.join()
    assert np.array_equal(found[0], products(PanelKernel("bfloat16"), weights, blocks, IDS))
