"""Attention of one new token: against float64 over shapes, groups, masks and strides; on every path; refusals."""

import math
import re

import numpy as np
import pytest
import torch

import cpu_kernels as ck
from cpu_kernels.backends import attention
from cpu_kernels.host import isa
from cpu_kernels.simd.attention import HEAD_BLOCK, RUN, AttendKernel
from cpu_kernels.simd.compile import Target, assembly, kernel_address

ROUNDING = 2.0**-8
"""Half a unit in the last place of bfloat16, relative: how the result is written."""
SUMMING = 1e-5
"""Float32 sums of a few thousand terms, relative to the largest value."""


def random_case(seed, heads, kv_heads, n_tokens, dim, v_dim, batch=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (scale * torch.randn(shape, generator=generator)).bfloat16()

    return (
        normal(batch, heads, 1, dim),
        normal(batch, kv_heads, n_tokens, dim),
        normal(batch, kv_heads, n_tokens, v_dim),
    )


def exact(query, keys, values, scale, bias=None):
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias.double()[:, None, None]
    return torch.softmax(scores, -1) @ values


def assert_close(result, expected, values):
    allowed = ROUNDING * expected.abs() + SUMMING * values.double().abs().max()
    assert result.dtype == torch.bfloat16
    assert bool(((result.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "n_tokens", "dim", "v_dim"),
    [
        (1, 1, 1, 16, 16),
        (4, 4, 17, 64, 64),
        (16, 2, RUN - 1, 128, 128),
        (10, 2, RUN, 128, 80),
        (6, 1, RUN + 1, 192, 128),
        (3, 3, 3 * RUN + 40, 96, 32),
        (HEAD_BLOCK + 1, 1, 1000, 256, 256),
        (14, 2, 5, 48, 16),
    ],
)
def test_shapes_and_groups(heads, kv_heads, n_tokens, dim, v_dim):
    query, keys, values = random_case(1, heads, kv_heads, n_tokens, dim, v_dim)
    result = ck.decode_attention(query, keys, values, dim**-0.5)
    assert_close(result, exact(query, keys, values, dim**-0.5), values)


def test_large_scores_do_not_overflow():
    query, keys, values = random_case(2, 2, 2, 600, 64, 64, scale=30.0)
    result = ck.decode_attention(query, keys, values, 1.0)
    assert_close(result, exact(query, keys, values, 1.0), values)


def test_batches_with_masked_tokens():
    query, keys, values = random_case(3, 4, 2, 2 * RUN + 7, 64, 64, batch=3)
    bias = torch.zeros(3, keys.shape[2])
    bias[0, :40] = -math.inf  # padding before the prompt
    bias[1, : RUN + 3] = -math.inf  # a whole run is masked
    bias[2] = torch.randn(keys.shape[2])
    assert_close(ck.decode_attention(query, keys, values, 0.2, bias), exact(query, keys, values, 0.2, bias), values)


def test_keys_and_values_of_any_stride():
    query, keys, values = random_case(4, 4, 2, 300, 64, 32, batch=2)
    room_k, room_v = torch.full((2, 2, 512, 64), math.nan).bfloat16(), torch.full((2, 300, 2, 32), math.nan).bfloat16()
    room_k[:, :, :300], room_v[:] = keys, values.transpose(1, 2)
    strided = ck.decode_attention(query, room_k[:, :, :300], room_v.transpose(1, 2), 0.125)
    assert torch.equal(strided, ck.decode_attention(query, keys, values, 0.125))


def test_the_bits_do_not_depend_on_threads():
    query, keys, values = random_case(5, 8, 4, 2500, 128, 128)
    results = [ck.decode_attention(query, keys, values, 0.1, threads=threads) for threads in (1, None)]
    assert torch.equal(*results)


def here():
    have = isa.cpu_features()
    return [path.name for path in isa.PATHS if not isa.missing_features(path, have)]


@pytest.mark.parametrize("name", here())
def test_arithmetic_of_every_path(name, monkeypatch):
    kernels = (*(kernel_address(AttendKernel(n), name) for n in (HEAD_BLOCK, 1)), attention.ATTEND_WORK.address)
    monkeypatch.setattr(attention, "_kernels", lambda: kernels)
    query, keys, values = random_case(6, 5, 1, RUN + 3, 64, 48)
    assert_close(ck.decode_attention(query, keys, values, 0.3), exact(query, keys, values, 0.3), values)


def test_asking_for_lines_far_ahead_changes_no_bit(monkeypatch):
    query, keys, values = random_case(8, 5, 1, 2 * RUN + 3, 64, 48)
    results = []
    for far in (False, True):
        attend = (kernel_address(AttendKernel(n, far=far), here()[0]) for n in (HEAD_BLOCK, 1))
        kernels = (*attend, attention.ATTEND_WORK.address)
        monkeypatch.setattr(attention, "_kernels", lambda kernels=kernels: kernels)
        results.append(ck.decode_attention(query, keys, values, 0.3))
    assert torch.equal(*results)
    target = Target("x86_64-unknown-linux-gnu", "sapphirerapids", "")
    near, far = (assembly(AttendKernel(1, far=far), isa.BY_NAME["avx512vnni"], target) for far in (False, True))
    assert far.count("prefetch") > near.count("prefetch") > 0


@pytest.mark.parametrize("n_heads", [1, HEAD_BLOCK])
@pytest.mark.parametrize(
    ("name", "cpu", "wide"),
    [("avx512vnni", "sapphirerapids", "zmm"), ("avx512", "skylake-avx512", "zmm"), ("avx2", "znver3", "ymm")],
)
def test_assembly_for_other_cpus(name, cpu, wide, n_heads):
    """Full-width products only, the sums of values in registers, and no call (exp is part of it)."""
    text = assembly(AttendKernel(n_heads), isa.BY_NAME[name], Target("x86_64-unknown-linux-gnu", cpu, ""))
    products = [line for line in text.splitlines() if "vfmadd" in line]
    assert products
    assert all(wide in line for line in products)
    assert "callq" not in text
    assert not re.search(r"vfmadd\w+s[sd]\b", text)


def refused(query, keys, values, bias=None):
    with pytest.raises(ck.LayoutError) as caught:
        ck.decode_attention(query, keys, values, 1.0, bias)
    return str(caught.value)


def test_what_does_not_fit_is_refused_with_what_was_found():
    query, keys, values = random_case(7, 4, 2, 9, 32, 32)
    assert "torch.float32[1, 4, 1, 32]" in refused(query.float(), keys, values)
    assert "[1, 4, 2, 32]" in refused(query.expand(1, 4, 2, 32), keys, values)
    assert "multiples of" in refused(query[..., :18], keys[..., :18], values)  # of 4 on the portable path
    assert "do not fit together" in refused(query, keys, values[:, :, :8])
    assert "do not fit together" in refused(query[..., :16], keys, values)
    assert "expected bias [1, 9], found [1, 8]" in refused(query, keys, values, torch.zeros(1, 8))
    assert "k torch.bfloat16[1, 2, 0, 32]" in refused(query, keys[:, :, :0], values[:, :, :0])


def test_rounding_is_to_the_nearest_even():
    values = torch.tensor([1.0, 1.0 + 2.0**-7]).bfloat16().view(1, 1, 2, 1).expand(1, 1, 2, 16).contiguous()
    halfway = ck.decode_attention(torch.zeros(1, 1, 1, 16).bfloat16(), torch.zeros_like(values), values, 1.0)
    assert np.unique(halfway.float().numpy()).tolist() == [1.0], "1 + 2 ** -8 lies between; 1.0 is even"
