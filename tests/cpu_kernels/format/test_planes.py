"""Bit planes of int4 records: together the record bit by bit, plane A alone the nearest expert of 2-bit codes."""

import numpy as np
import pytest
import torch

from cpu_kernels import ExpertSpec, ExpertWeights, pack_expert, unpack_expert
from cpu_kernels.errors import LayoutError
from cpu_kernels.format.pack import unpack_codes
from cpu_kernels.format.planes import expand_high, merge_low, plane_bytes, split_record
from cpu_kernels.format.spec import Activation

SPECS = [
    ExpertSpec(64, 32, "int4"),
    ExpertSpec(100, 70, "int4", has_bias=True),
    ExpertSpec(128, 64, "int4", Activation("gelu", gated=False)),
]


def packed(spec, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    gated, bias = spec.activation.gated, spec.has_bias
    weights = ExpertWeights(
        up=normal(spec.inter, spec.hidden), down=normal(spec.hidden, spec.inter),
        gate=normal(spec.inter, spec.hidden) if gated else None,
        gate_bias=normal(spec.inter) if bias and gated else None, up_bias=normal(spec.inter) if bias else None,
        down_bias=normal(spec.hidden) if bias else None,
    )  # fmt: skip
    record = np.zeros(spec.record_bytes, np.uint8)
    pack_expert(spec, weights, record)
    return torch.from_numpy(record)


@pytest.mark.parametrize("spec", SPECS)
def test_both_planes_are_the_record(spec):
    record = packed(spec)
    high, low = split_record(spec, record)
    assert (high.numel(), low.numel()) == plane_bytes(spec)
    assert high.numel() + low.numel() == spec.record_bytes
    found = torch.full_like(record, 0xFF)
    expand_high(spec, high, found)
    assert not torch.equal(found, record)
    merge_low(spec, low, found)
    assert torch.equal(found, record)


@pytest.mark.parametrize("spec", SPECS)
def test_the_high_plane_keeps_the_high_bits_scales_and_biases(spec):
    record = packed(spec)
    half = torch.empty_like(record)
    expand_high(spec, split_record(spec, record)[0], half)
    data, cut = (
        slice(spec.layout.down_offset, spec.layout.down_end),
        (spec.layout.hidden_padded, spec.layout.inter_padded),
    )
    exact, scales = unpack_codes(record[data].contiguous(), *cut, "int4")
    rough, same = unpack_codes(half[data].contiguous(), *cut, "int4")
    assert torch.equal(rough >> 2, exact >> 2)
    assert torch.equal(rough & 3, torch.where(exact < 8, 2, 1).to(torch.uint8))
    assert torch.equal(scales, same)
    assert torch.equal(record[spec.layout.down_end :], half[spec.layout.down_end :])


def test_a_code_by_hand():
    """q = -7 (code 1 = 4 * 0 + 1) reads as code 2, q = -6; q = 3 (code 11 = 4 * 2 + 3) as code 9, q = 1."""
    spec = SPECS[0]
    record = packed(spec)
    record[0] = 1 | (11 << 4)
    half = torch.empty_like(record)
    expand_high(spec, split_record(spec, record)[0], half)
    assert int(half[0]) == 2 | (9 << 4)


def test_the_high_plane_alone_is_a_usable_expert_without_bias():
    spec = SPECS[0]
    record = packed(spec)
    half = torch.empty_like(record)
    expand_high(spec, split_record(spec, record)[0], half)
    exact, rough = unpack_expert(spec, record.numpy()).up, unpack_expert(spec, half.numpy()).up
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.93
    assert abs(float((rough - exact).mean())) < 0.02 * float(exact.abs().mean())


def test_only_int4_has_planes():
    with pytest.raises(LayoutError, match="int4"):
        plane_bytes(ExpertSpec(64, 32, "int8"))
