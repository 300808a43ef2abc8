"""Records: lossless float formats, quantisation error, layout on any device, bad input."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import cpu_kernels as ck
from cpu_kernels.format import layout

# Largest error as a share of a group's extreme. int4 may clip the other end: 8.6 steps to the extreme, 7 on that side.
ROUNDING = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127 * 1.01, "int4": 1.6 / 8.6 * 1.02}
ROUNDING |= {"int6": 3.4 / 34.4 * 1.05, "int5": 2.2 / 17.2 * 1.05, "int3": 0.5, "int2": 0.8}
NORMAL_ERROR = {"int8": 0.0054, "int6": 0.0203, "int5": 0.0406, "int4": 0.0826, "int3": 0.1645, "int2": 0.3375}
"""Root mean square of what normal weights lose, over theirs: computed apart, by a search in float64."""


def weights_of(spec: ck.ExpertSpec, seed: int = 0) -> ck.ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up": (spec.inter, spec.hidden), "down": (spec.hidden, spec.inter)}
    if spec.activation.gated:
        shapes["gate"] = (spec.inter, spec.hidden)
    if spec.has_bias:
        shapes |= {"up_bias": (spec.inter,), "down_bias": (spec.hidden,)}
        if spec.activation.gated:
            shapes["gate_bias"] = (spec.inter,)
    return ck.ExpertWeights(**{k: torch.randn(*v, generator=generator) for k, v in shapes.items()})


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 140),
    st.integers(1, 140),
    st.sampled_from(ck.DTYPES),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_round_trip(hidden: int, inter: int, dtype: ck.ExpertDtype, gated: bool, bias: bool, seed: int) -> None:
    spec = ck.ExpertSpec(hidden, inter, dtype, ck.Activation("silu", gated=gated), bias)
    weights = weights_of(spec, seed)
    record = np.full(spec.record_bytes, 0x7F, np.uint8)  # stale bytes must not survive
    ck.pack_expert(spec, weights, record)
    record.flags.writeable = False  # a memory map
    unpacked = ck.unpack_expert(spec, record)
    unpacked.check(spec)
    for name in ("gate", "up", "down"):
        before, after = getattr(weights, name), getattr(unpacked, name)
        if before is None:
            continue
        if dtype == "bfloat16":
            assert torch.equal(after, before.bfloat16())
        assert_close_per_group(before, after.float(), ROUNDING[dtype])
    for name in ("gate_bias", "up_bias", "down_bias"):
        if getattr(weights, name) is not None:
            assert torch.equal(getattr(weights, name), getattr(unpacked, name))


def assert_close_per_group(before: torch.Tensor, after: torch.Tensor, share: float) -> None:
    columns = -before.shape[1] % layout.GROUP
    groups = torch.nn.functional.pad(before, (0, columns)).view(before.shape[0], -1, layout.GROUP)
    error = torch.nn.functional.pad(after - before, (0, columns)).view(groups.shape)
    assert bool((error.abs().amax(2) <= share * groups.abs().amax(2) + 1e-30).all())


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("float32", 32),
        ("bfloat16", 16),
        ("int8", 8.5),
        ("int6", 6.5),
        ("int5", 5.5),
        ("int4", 4.5),
        ("int3", 3.5),
        ("int2", 2.5),
    ],
)
def test_size(dtype: ck.ExpertDtype, bits: float) -> None:
    spec = ck.ExpertSpec(256, 128, dtype)
    assert spec.record_bytes == bits * 3 * 256 * 128 / 8
    assert spec.record_bytes % 64 == 0
    assert ck.ExpertSpec(250, 127, dtype, has_bias=True).record_bytes == spec.record_bytes + 4 * (256 + 2 * 128)


@pytest.mark.parametrize("dtype", layout.PLANES)
def test_the_scales_are_nearly_the_best(dtype: ck.ExpertDtype) -> None:
    spec = ck.ExpertSpec(256, 512, dtype)
    weights, record = weights_of(spec), np.zeros(spec.record_bytes, np.uint8)
    ck.pack_expert(spec, weights, record)
    error = float((ck.unpack_expert(spec, record).down - weights.down).square().mean().sqrt())
    assert error == pytest.approx(NORMAL_ERROR[dtype], rel=0.02)


@pytest.mark.parametrize("dtype", [dtype for dtype in layout.PLANES if dtype != "int8"])
def test_weights_of_so_many_bits_keep_their_codes(dtype: ck.ExpertDtype) -> None:
    """Symmetric codes with bfloat16 scales, as GPTQ and compressed-tensors write them."""
    spec, half = ck.ExpertSpec(256, 64, dtype), layout.OFFSET[dtype]
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-half, half, (256, 2, 32), generator=generator)
    scales = torch.rand(256, 2, 1, generator=generator).add_(0.01).bfloat16().float()
    weights = weights_of(spec)
    down = (codes * scales).view(256, 64)
    record = np.zeros(spec.record_bytes, np.uint8)
    ck.pack_expert(spec, ck.ExpertWeights(weights.up, down, weights.gate), record)
    assert torch.equal(ck.unpack_expert(spec, record).down, down)


def test_int4_uses_the_better_end_of_the_code_range() -> None:
    spec = ck.ExpertSpec(64, 64, "int4", ck.Activation("relu", gated=False))
    weights = weights_of(spec)
    record = np.zeros(spec.record_bytes, np.uint8)
    ck.pack_expert(spec, weights, record)
    groups = weights.up.view(64, 2, 32)
    scale = groups.abs().amax(2, keepdim=True) / 7
    naive = ((groups / scale).round() * scale).view(64, 64)
    error = (ck.unpack_expert(spec, record).up - weights.up).square().mean()
    assert error < 0.92 * (naive - weights.up).square().mean()


def test_small_and_zero_groups_survive() -> None:
    spec = ck.ExpertSpec(64, 64, "int8", ck.Activation("relu", gated=False))
    up = torch.zeros(64, 64)
    up[0, :32] = torch.linspace(-3e-7, 3e-7, 32)
    record = np.zeros(spec.record_bytes, np.uint8)
    ck.pack_expert(spec, ck.ExpertWeights(up=up, down=torch.zeros(64, 64)), record)
    unpacked = ck.unpack_expert(spec, record).up
    assert torch.allclose(unpacked[0, :32], up[0, :32], rtol=0, atol=3e-7 / 127)
    assert not unpacked[1:].any()


def test_unpack_takes_tensors_of_any_device() -> None:
    spec = ck.ExpertSpec(70, 50, "int4", has_bias=True)
    record = np.zeros(spec.record_bytes, np.uint8)
    ck.pack_expert(spec, weights_of(spec), record)
    here = ck.unpack_expert(spec, record)
    there = ck.unpack_expert(spec, torch.from_numpy(record).to("meta"))
    assert torch.equal(ck.unpack_expert(spec, torch.from_numpy(record)).down, here.down)
    assert there.gate is not None
    assert there.gate.device.type == "meta"
    assert there.gate.shape == (50, 70)


def test_accepts_transposed_sources() -> None:
    spec = ck.ExpertSpec(64, 96, "bfloat16")
    weights = weights_of(spec)
    assert weights.gate is not None
    views = ck.ExpertWeights(weights.up.T.contiguous().T, weights.down.T.contiguous().T, weights.gate.T.contiguous().T)
    records = np.zeros((2, spec.record_bytes), np.uint8)
    ck.pack_expert(spec, weights, records[0])
    ck.pack_expert(spec, views, records[1])
    assert np.array_equal(records[0], records[1])


@pytest.mark.parametrize("dtype", ck.DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(dtype: ck.ExpertDtype, value: float) -> None:
    spec = ck.ExpertSpec(64, 64, dtype)
    weights = weights_of(spec)
    weights.down[3, 5] = value
    with pytest.raises(ck.LayoutError, match="down weights contain NaN or infinity"):
        ck.pack_expert(spec, weights, np.zeros(spec.record_bytes, np.uint8))


def test_bias_that_is_not_finite() -> None:
    spec = ck.ExpertSpec(64, 64, "int8", has_bias=True)
    weights = weights_of(spec)
    assert weights.up_bias is not None
    weights.up_bias[0] = float("nan")
    with pytest.raises(ck.LayoutError, match="bias"):
        ck.pack_expert(spec, weights, np.zeros(spec.record_bytes, np.uint8))


def test_wrong_shapes_and_buffers() -> None:
    spec = ck.ExpertSpec(64, 32, "int8")
    weights = weights_of(spec)
    good = np.zeros(spec.record_bytes, np.uint8)
    with pytest.raises(ck.LayoutError, match=r"uint8\[\d+\], found uint8\[100\]"):
        ck.pack_expert(spec, weights, np.zeros(100, np.uint8))
    with pytest.raises(ck.LayoutError, match="found int8"):
        ck.pack_expert(spec, weights, good.view(np.int8))
    with pytest.raises(ck.LayoutError, match="contiguous"):
        ck.pack_expert(spec, weights, np.zeros(2 * spec.record_bytes, np.uint8)[::2])
    with pytest.raises(ck.LayoutError, match=r"up has shape \(64, 32\), expected \(32, 64\)"):
        ck.pack_expert(spec, ck.ExpertWeights(weights.down, weights.down, weights.gate), good)
    with pytest.raises(ck.LayoutError, match="gate is missing"):
        ck.pack_expert(spec, ck.ExpertWeights(weights.up, weights.down), good)
    with pytest.raises(ck.LayoutError, match=r"dtype torch\.int32"):
        ck.pack_expert(spec, ck.ExpertWeights(weights.up.int(), weights.down, weights.gate), good)


def test_bad_specs() -> None:
    with pytest.raises(ck.KernelError, match="int7"):
        ck.ExpertSpec(64, 64, "int7")  # type: ignore[arg-type]
    with pytest.raises(ck.KernelError, match="at least 1"):
        ck.ExpertSpec(0, 64, "int8")
    with pytest.raises(ck.KernelError, match="swish"):
        ck.Activation("swish")  # type: ignore[arg-type]
    with pytest.raises(ck.KernelError, match="custom"):
        ck.Activation("custom")
    with pytest.raises(ck.KernelError, match="gated"):
        ck.Activation("relu", gated=False, up_limit=7.0)
