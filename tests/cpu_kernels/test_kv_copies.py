"""Blocks of tokens joined in a KV cache: the bytes of a concatenation, whatever their shapes, and nothing beside."""

import pytest
import torch

from cpu_kernels.errors import LayoutError
from cpu_kernels.step.kv_copies import join_tokens


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize(("batch", "heads", "row"), [(1, 1, 1), (1, 3, 7), (2, 2, 64), (3, 5, 132)])
def test_the_parts_lie_one_after_another(dtype: torch.dtype, batch: int, heads: int, row: int) -> None:
    longer = drawn(batch, heads, 90, row, dtype=dtype)
    parts = [longer[..., begin:end, :] for begin, end in ((0, 64), (64, 64), (64, 65), (7, 20))]
    parts.append(drawn(batch, heads, 33, row, dtype=dtype))
    n_tokens = sum(part.shape[2] for part in parts)
    for threads in (1, 2, None):
        buffer = torch.full((batch, heads, n_tokens + 9, row), 5).to(dtype)
        join_tokens(buffer[..., 4 : 4 + n_tokens, :], parts, threads)
        assert torch.equal(buffer[..., 4 : 4 + n_tokens, :], torch.cat(parts, 2))
        assert (buffer[..., :4, :] == 5).all()
        assert (buffer[..., 4 + n_tokens :, :] == 5).all()


def test_nothing_is_nothing() -> None:
    join_tokens(torch.empty(1, 2, 0, 4), [])
    join_tokens(torch.empty(1, 2, 0, 4), [torch.empty(1, 2, 0, 4)])


def test_what_does_not_fit_is_refused() -> None:
    target = torch.zeros(1, 2, 8, 4)
    part = torch.ones(1, 2, 8, 4)
    for parts in (
        [part[..., :7, :]], [part, part[..., :1, :]], [part.half()], [part[:, :1]], [part[..., :2]], [],
        [torch.ones(1, 2, 4, 8).mT], [torch.ones(1, 2, 16, 4)[..., ::2, :]],
    ):  # fmt: skip
        with pytest.raises(LayoutError, match=r"expected parts of torch\.float32 .* that make up \[1, 2, 8, 4\]"):
            join_tokens(target, parts)
    assert not target.any()
