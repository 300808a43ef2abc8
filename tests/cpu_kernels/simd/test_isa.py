"""Vector paths: choice, override, arithmetic of every path on this CPU, and the code they compile to on others."""

import os
import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from numba import njit

import cpu_kernels as ck
from cpu_kernels.format.layout import BLOCK_ROWS, GROUP, LINE_BYTES, LINES, OFFSET, PLANES, block_bytes
from cpu_kernels.format.pack import pack_matrix, unpack_matrix
from cpu_kernels.host import isa
from cpu_kernels.jit.primitives import call_panel
from cpu_kernels.simd.compile import Target, VectorKernel, assembly, kernel_address
from cpu_kernels.simd.formats import Format, format_of
from cpu_kernels.simd.rows import FinishKernel, PrepareKernel
from cpu_kernels.simd.tiles import PanelKernel

X86 = "x86_64-unknown-linux-gnu"
AVX512 = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"})


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (AVX512 | {"avx512vnni", "avx512bf16", "amx-tile", "amx-bf16"}, "amx"),
        (AVX512 | {"avx512vnni", "avx512bf16", "amx-tile", "amx-int8"}, "avx512bf16"),
        (AVX512 | {"avx512vnni", "avxvnni", "avx512bf16"}, "avx512bf16"),
        (AVX512 | {"avx512vnni", "avxvnni"}, "avx512vnni"),
        (AVX512 | {"avx512bf16"}, "avx512"),
        (AVX512, "avx512"),
        (frozenset({"avx2", "fma", "avxvnni"}), "avxvnni"),
        (frozenset({"avx2", "fma"}), "avx2"),
        (frozenset({"avx2"}), "portable"),
        (frozenset({"neon", "dotprod"}), "portable"),
        (frozenset(), "portable"),
    ],
)
def test_choice(features: frozenset[str], expected: str) -> None:
    choice = isa.choose_isa(features)
    assert choice.isa.name == expected
    assert all("lacks" in reason for _, reason in choice.rejected)


def test_override_is_checked() -> None:
    assert isa.choose_isa(AVX512, "avx2").isa.name == "avx2"
    with pytest.raises(ck.IsaError, match="needs avx512vnni"):
        isa.choose_isa(AVX512, "avx512vnni")
    with pytest.raises(ck.IsaError, match="'sse9' is unknown; expected one of amx"):
        isa.choose_isa(AVX512, "sse9")


def test_a_forced_path_compiles_without_better_instructions() -> None:
    features = AVX512 | {"avx512vnni", "avx512vbmi", "avxvnni", "bmi2"}
    assert isa.path_features(isa.BY_NAME["avx512vnni"], features | {"avx512bf16"}) == features
    with_tiles = features | {"avx512bf16", "amx-tile", "amx-bf16"}
    assert isa.path_features(isa.BY_NAME["avx512bf16"], with_tiles) == features | {"avx512bf16"}
    assert isa.path_features(isa.BY_NAME["avx2"], features) == {"avx2", "fma", "bmi2"}
    assert isa.path_features(isa.BY_NAME["portable"], features) == {"bmi2"}
    assert isa.path_features(isa.BY_NAME["avx512vnni"], features) == features


@njit
def run_panel(
    function: int,
    weights: np.ndarray,
    row_block_bytes: int,
    n_blocks: int,
    x: np.ndarray,
    x_row_bytes: int,
    ids: np.ndarray,
    out: np.ndarray,
) -> None:
    call_panel(
        function,
        weights.ctypes.data,
        row_block_bytes,
        n_blocks,
        x.ctypes.data,
        x_row_bytes,
        ids.ctypes.data,
        out.shape[0],
        out.ctypes.data,
    )


@cache
def case(dtype: str, form: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Packed weights [64, 192], activations as `panel` reads them, row ids, and the exact product."""
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(64, 192, generator=generator)
    packed = torch.zeros(4 * 3 * block_bytes(dtype), dtype=torch.uint8)
    pack_matrix(matrix, dtype, "test", packed)
    x, data = WRITERS[form](torch.randn(15, 192, generator=generator), dtype)
    ids = np.random.default_rng(0).permutation(15).astype(np.int32)
    product = x.double() @ unpack_matrix(packed, 64, 192, dtype).double().T
    return packed.numpy(), data.numpy(), ids, product.numpy()[ids]


def quantised(x: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the codes stand for, and the blocks."""
    groups = x.view(15, -1, GROUP)
    scales = groups.abs().amax(2) / 127
    codes = (groups / scales.unsqueeze(2)).round()
    sums = (-OFFSET[dtype] * codes.sum(2)).int()
    parts = [codes.to(torch.int8).view(15, 3, 64), scales.view(15, 3, 2), sums.view(15, 3, 2)]
    data = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=2).contiguous()
    return (codes * scales.unsqueeze(2)).view(15, 192), data


def paired(x: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x rounded to bfloat16, and the blocks."""
    x = x.bfloat16()
    parts = [x.float().view(15, 3, 64).view(torch.uint8), x.view(15, 3, 64).view(torch.uint8)]
    return x.float(), torch.cat(parts, dim=2).contiguous()


def split(x: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x rounded to bfloat16, and the blocks."""
    x = x.bfloat16()
    high = x.view(15, 3, 64).view(torch.uint8)
    return x.float(), torch.cat([high, torch.zeros_like(high), torch.zeros_like(high)], dim=2).contiguous()


WRITERS = {
    "plain": lambda x, dtype: (x, x.view(torch.uint8)),
    "quantised": quantised,
    "paired": paired,
    "split": split,
}


def runnable() -> list[tuple[str, bool]]:
    """(path, emulated): each path that this CPU has, and those with narrow products with them in plain arithmetic."""
    have = isa.cpu_features()
    paths = [(path.name, False) for path in isa.PATHS if not isa.missing_features(path, have)]
    wide_enough = [p for p in isa.PATHS if not {"avx2", "fma"} - have or p.name == "portable"]
    return paths + [(path.name, True) for path in wide_enough if path.dot == "vnni"]


@pytest.mark.parametrize("dtype", PLANES)
@pytest.mark.parametrize(("name", "emulated"), runnable())
def test_arithmetic_of_each_integer_path(name: str, emulated: bool, dtype: str) -> None:
    check_panel(name, PanelKernel(dtype, emulate_dot=emulated))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [name for name, emulated in runnable() if not emulated])
def test_arithmetic_of_each_float_path(name: str, dtype: str) -> None:
    check_panel(name, PanelKernel(dtype))


@pytest.mark.parametrize("name", [name for name, emulated in runnable() if emulated and isa.BY_NAME[name].bf16_dot])
def test_arithmetic_of_emulated_bfloat16_products(name: str) -> None:
    check_panel(name, PanelKernel("bfloat16", pairs=True, emulate_dot=True))


def products(name: str, kernel: PanelKernel) -> tuple[np.ndarray, np.ndarray]:
    """Ones plus the product, from one call and from a call for each row; `panel` adds to what is there."""
    form = format_of(kernel.dtype, isa.BY_NAME[name])
    packed, x, ids, _ = case(kernel.dtype, form.kind)
    function, sizes = kernel_address(kernel, name), (3 * block_bytes(kernel.dtype), 3)
    together, singles = np.ones((15, 64), np.float32), np.ones((15, 64), np.float32)
    run_panel(function, packed, *sizes, x, 3 * form.block_bytes, ids, together)
    for i in range(15):
        run_panel(function, packed, *sizes, x, 3 * form.block_bytes, ids[i:], singles[i : i + 1])
    return together, singles


def check_panel(name: str, kernel: PanelKernel) -> None:
    together, singles = products(name, kernel)
    expected = case(kernel.dtype, format_of(kernel.dtype, isa.BY_NAME[name]).kind)[3]
    np.testing.assert_allclose(together - 1, expected, atol=2e-5 * np.abs(expected).max())
    assert np.array_equal(singles, together)  # every tile gives the same bits


@pytest.mark.parametrize("dtype", PLANES)
def test_vpdpbusd_and_its_emulation_give_the_same_bits(dtype: str) -> None:
    for name in [name for name, emulated in runnable() if not emulated and isa.BY_NAME[name].dot == "vnni"]:
        real, emulated = (products(name, PanelKernel(dtype, emulate_dot=e))[0] for e in (False, True))
        assert np.array_equal(real, emulated)


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(("name", "emulated"), [(n, e) for n, e in runnable() if isa.BY_NAME[n].bf16_dot])
def test_bfloat16_pairs_give_the_same_bits_as_float32(name: str, emulated: bool, many: bool) -> None:
    """So a token's result does not depend on whether all tokens of the call are bfloat16."""
    kernel = PanelKernel("bfloat16", pairs=True, emulate_dot=emulated, many_pairs=many)
    check_panel(name, kernel)
    pairs = products(name, kernel)[0]
    assert np.array_equal(pairs, products(name, PanelKernel("bfloat16", emulate_dot=emulated))[0])


# Tiles, which multiply bfloat16 weights alone, add in another order.
VECTOR_PATHS = [name for name, emulated in runnable() if not emulated and not isa.BY_NAME[name].bf16_tiles]


@pytest.mark.parametrize("name", VECTOR_PATHS)
def test_float32_and_bfloat16_give_the_same_bits_for_the_same_weights(name: str) -> None:
    matrix = torch.randn(64, 192, generator=torch.Generator().manual_seed(6)).bfloat16().float()
    results = []
    for dtype in ("float32", "bfloat16"):
        form = format_of(dtype, isa.BY_NAME[name])
        packed = torch.zeros(4 * 3 * block_bytes(dtype), dtype=torch.uint8)
        pack_matrix(matrix, dtype, "test", packed)
        _, x, ids, _ = case("bfloat16", "paired")
        if form.kind == "plain":  # the first part of the paired blocks
            x = x.reshape(15, 3, -1)[:, :, : form.block_bytes].copy()
        out = np.zeros((15, 64), np.float32)
        sizes = (3 * block_bytes(dtype), 3)
        run_panel(kernel_address(PanelKernel(dtype), name), packed.numpy(), *sizes, x, 3 * form.block_bytes, ids, out)
        results.append(out)
    assert np.array_equal(*results)


ZNVER4, SAPPHIRE = Target(X86, "znver4", ""), Target(X86, "sapphirerapids", "")
TARGETS = [
    ("avx512vnni", ZNVER4, PanelKernel("int4"), "vpdpbusd"),
    ("avx512vnni", SAPPHIRE, PanelKernel("int8"), "vpdpbusd"),
    ("avx512vnni", SAPPHIRE, PanelKernel("int6"), "vpdpbusd"),
    ("avx512vnni", ZNVER4, PanelKernel("int5"), "vpdpbusd"),
    ("avx512vnni", ZNVER4, PanelKernel("int3"), "vpdpbusd"),
    ("avx512vnni", ZNVER4, PanelKernel("int2"), "vpdpbusd"),
    ("avx512", Target(X86, "skylake-avx512", ""), PanelKernel("int4"), "vpmaddubsw"),
    ("avxvnni", Target(X86, "alderlake", ""), PanelKernel("int4"), "vpdpbusd"),
    ("avx2", Target(X86, "znver3", ""), PanelKernel("int8"), "vpmaddubsw"),
    ("avx512bf16", ZNVER4, PanelKernel("bfloat16", pairs=True, many_pairs=True), "vdpbf16ps"),
    ("avx512bf16", SAPPHIRE, PanelKernel("bfloat16", pairs=True, many_pairs=True), "vdpbf16ps"),
    ("avx512vnni", SAPPHIRE, PanelKernel("bfloat16"), "vfmadd"),
    ("avx2", Target(X86, "haswell", ""), PanelKernel("float32"), "vfmadd"),
]
SCALAR = r"\b(v?mulss|v?fmadd\d+ss|v?cvtsi2ss|imul[lb])\b"


@pytest.mark.parametrize(
    ("name", "target", "kernel", "product"), TARGETS, ids=lambda v: getattr(v, "cpu", getattr(v, "name", v))
)
def test_assembly_for_other_cpus(name: str, target: Target, kernel: PanelKernel, product: str) -> None:
    """Full-width registers, the right products, no spill storm, no scalar loop."""
    path = isa.BY_NAME[name]
    text = assembly(kernel, path, target)
    loops = tile_loops(text)
    assert len(loops) >= len(path.tiles)
    wide = "%zmm" if path.lanes == 16 else "%ymm"
    for loop in loops:
        products = [line for line in loop if product in line]
        assert products
        assert all(wide in line for line in products)
        spills = [line for line in loop if "(%rsp)" in line and wide in line]
        assert len(spills) <= 0.15 * len(loop)
        assert not [line for line in loop if re.search(SCALAR, line)]
    if name == "avxvnni":
        assert "{vex}" in text or "zmm" not in text


def test_only_few_tokens_multiply_pairs_where_many_take_longer_by_it() -> None:
    kernel = PanelKernel("bfloat16", pairs=True, many_pairs=False)
    loops = tile_loops(assembly(kernel, isa.BY_NAME["avx512bf16"], SAPPHIRE))
    paired = [any("vdpbf16ps" in line for line in loop) for loop in loops]
    assert paired == sorted(paired)  # from many tokens to one
    assert paired[0] is False
    assert paired[-1] is True


@pytest.mark.parametrize("dtype", ck.DTYPES)
def test_one_token_reads_weights_in_ascending_order(dtype: str) -> None:
    """One stream for the CPU's prefetchers: no line of a block is loaded before one that lies ahead of it."""
    text = assembly(PanelKernel(dtype), isa.BY_NAME["avx512vnni"], ZNVER4)
    loop = tile_loops(text)[-1]  # of the smallest tile
    reads = [re.search(r"vmov(?:dqu\w*|ups)\s+(-?\d*)\((%\w+[^)]*)\), %zmm", line) for line in loop]
    places = [(read[2], int(read[1] or 0)) for read in reads if read]
    assert len(places) >= min(8, LINES[dtype])
    assert len({register for register, _ in places}) == 1
    offsets = [offset for _, offset in places]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize(("dtype", "once"), [("int4", True), ("int8", True), ("bfloat16", True), ("float32", False)])
def test_one_token_leaves_the_caches_to_others(dtype: str, once: bool) -> None:
    """Every line is asked for as read once: what runs between two layers finds its own in the caches."""
    text = assembly(PanelKernel(dtype, once=True), isa.BY_NAME["avx2"], Target(X86, "znver1", ""))
    assert text.count("prefetchnta") == (block_bytes(dtype) // LINE_BYTES if once else 0)
    elsewhere = PanelKernel(dtype, once=False)
    few = [
        assembly(PanelKernel(dtype, once=False, each_line=each), isa.BY_NAME["avx512vnni"], SAPPHIRE) for each in (0, 1)
    ]
    n_lines = block_bytes(dtype) // LINE_BYTES
    assert [tile_prefetches(text) for text in few] == [n_lines // 8, n_lines]
    assert "prefetchnta" not in assembly(elsewhere, isa.BY_NAME["avx2"], Target(X86, "haswell", ""))


@pytest.mark.parametrize(("cpu", "zen"), [("znver1", True), ("znver5", True), ("rocketlake", False), ("", False)])
def test_only_zen_passes_the_caches_by(monkeypatch: pytest.MonkeyPatch, cpu: str, zen: bool) -> None:
    monkeypatch.setattr(isa.llvm, "get_host_cpu_name", lambda: cpu)
    isa.is_zen.cache_clear()
    try:
        kernel = PanelKernel("int4")
        assert kernel.once is kernel.many_pairs is zen
        assert kernel.each_line is not zen
    finally:
        isa.is_zen.cache_clear()


FINISH = FinishKernel(Format("quantised", 8), "silu", gated=True)


@pytest.mark.parametrize("kernel", [FINISH, PrepareKernel(FINISH.form)], ids=lambda kernel: kernel.symbol)
@pytest.mark.parametrize(("name", "target", "wide"), [("avx512vnni", ZNVER4, "zmm"), ("avx2", ZNVER4, "ymm")])
def test_assembly_of_rows(name: str, target: Target, wide: str, kernel: VectorKernel) -> None:
    """Vectors as wide as the path's and no scalar loop of multiplications, exponentials or roundings."""
    text = assembly(kernel, isa.BY_NAME[name], target)
    assert re.search(rf"vmulps\s.*%{wide}", text)
    assert not re.search(r"vcvttss2si|vroundss|vcvtss2si", text)
    if kernel is FINISH:  # `prepare` calls memcpy for the columns of an incomplete block
        assert "callq" not in text
        assert re.search(rf"vdivps\s.*%{wide}", text)


def tile_loops(text: str) -> list[list[str]]:
    """Instructions of the innermost loops that hold products: from a label to the jump back to it."""
    lines = text.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    loops = []
    for i, line in enumerate(lines):
        jump = re.match(r"\s+j\w+\s+(\.LBB\w+)", line)
        if jump and labels.get(jump[1], i) < i:
            body = [text for text in lines[labels[jump[1]] : i] if text.startswith("\t") and not text.startswith("\t.")]
            inner = any(re.match(r"\s+j\w+\s+\.LBB", text) for text in body)
            if not inner and any(re.search("vpdpbusd|vpmaddubsw|vfmadd|vdpbf16ps", text) for text in body):
                loops.append(body)
    return loops


def tile_prefetches(text: str) -> int:
    """Lines that the loop of the smallest tile asks for."""
    body = text.split("tile_1x1:")[1].split(".Lfunc_end")[0]
    return body.count("prefetch")


def test_portable_path_compiles_for_aarch64() -> None:
    from llvmlite import binding as llvm

    try:
        llvm.initialize_all_targets()
        llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite is built without the AArch64 target")
    text = assembly(
        PanelKernel("int4"), isa.BY_NAME["portable"], Target("aarch64-unknown-linux-gnu", "neoverse-n1", "")
    )
    assert re.search(r"\bv\d+\.4s", text)


@pytest.mark.parametrize("name", ["avx512", "avxvnni", "avx2", "portable"])
def test_whole_backend_on_a_forced_path(name: str) -> None:
    """In a process of its own, as a user would set it."""
    if isa.missing_features(isa.BY_NAME[name], isa.cpu_features()):
        pytest.skip(f"this CPU lacks {name}")
    code = (
        "import numpy as np, torch, cpu_kernels as ck\n"
        "spec = ck.ExpertSpec(128, 96, 'int4'); w = torch.randn(96, 128) * 0.1\n"
        "record = np.zeros(spec.record_bytes, np.uint8)\n"
        "ck.pack_expert(spec, ck.ExpertWeights(w, w.T.contiguous(), w), record)\n"
        "d = ck.build_dispatch(np.zeros((5, 1), np.int64), np.ones((5, 1), np.float32), 1)\n"
        "x = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)\n"
        "y = [np.zeros_like(x), np.zeros_like(x)]\n"
        "for name, out in zip(('numba', 'reference'), y):\n"
        "    b = ck.get_backend(name)\n"
        "    b.run(spec, np.array([record.ctypes.data], np.uint64), np.zeros(1, np.int32), d, x, out)\n"
        "error = ck.relative_error(torch.from_numpy(y[0]), torch.from_numpy(y[1]))\n"
        "print(ck.get_backend('numba').choice.isa.name, error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {isa.ENV_ISA: name}, capture_output=True, text=True, check=True
    )
    path, error = result.stdout.split()
    assert path == name
    assert float(error) < ck.tolerance(ck.ExpertSpec(128, 96, "int4"))


def test_blocks_are_whole_cache_lines() -> None:
    assert all(block_bytes(dtype) % 64 == 0 for dtype in ck.DTYPES)
    assert BLOCK_ROWS * 4 == 64
