"""Outputs that are made several at a time: each is given once, and is like what it was asked for."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.engine.outputs import AT_ONCE, MAX_BYTES, Outputs


def test_each_output_is_given_once() -> None:
    outputs, like = Outputs(), torch.zeros(2, 8)
    taken = [outputs.take(like) for _ in range(3 * AT_ONCE)]
    assert len({address for _, address in taken}) == len(taken)
    assert all(tensor.data_ptr() == address for tensor, address in taken)
    taken[0][0].fill_(1.0)
    taken[1][0].fill_(2.0)
    assert (taken[0][0] == 1.0).all()


@pytest.mark.parametrize("inference", [False, True])
def test_shape_dtype_and_mode_are_those_of_the_call(inference: bool) -> None:
    outputs = Outputs()
    for like in (torch.zeros(2, 8), torch.zeros(1, 2, 8), torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, 8)):
        outputs.take(like)
        with torch.inference_mode(inference):
            made, _ = outputs.take(like)
        assert (made.shape, made.dtype, made.is_contiguous()) == (like.shape, like.dtype, True)
        assert made.is_inference() is inference


def test_large_outputs_are_made_alone() -> None:
    outputs = Outputs()
    outputs.take(torch.empty(MAX_BYTES // 4 + 1))
    assert not outputs._left
