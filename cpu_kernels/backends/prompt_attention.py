"""Attention of a prompt's tokens on the CPU, a block of cached tokens after the other.

The new tokens see all tokens before them, and each of them the new ones up to itself: so only the square of the new
tokens has a mask. Blocks before it have none, and stored rows become floats a block at a time. Products are torch's
(its flash kernel for the CPU); the results of blocks are joined by the logarithms of their sums, in float32 (Dao,
FlashAttention-2, 2023, section 3.1).
"""

from functools import cache

import torch

from cpu_kernels.errors import LayoutError
from cpu_kernels.step.kv_rows import turned
from cpu_kernels.step.states.stored import StoredStates

BLOCK_BYTES = 16 << 20
"""Of keys, or of values, at a time: of the floats that are made of them, and of the copy that torch's kernel makes for
the products, in new memory each time. Of all 16,384 tokens of 16 heads at once 128 queries take half as long again."""
LEAST_BLOCK_TOKENS = 256
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
"""torch's kernel, by its name among torch's operators: the one that also gives the logarithms of the sums."""


def supports_prompt_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `prompt_attention` takes these: float32 or bfloat16 on the CPU, heads of keys and values of one size."""
    return (
        _has_kernel()
        and query.dtype == keys.dtype == values.dtype
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.device.type == keys.device.type == "cpu"
        and query.dim() == keys.dim() == values.dim() == 4
        and query.shape[0] == keys.shape[0]
        and query.shape[3] == keys.shape[3] == values.shape[3]
        and keys.shape[:3] == values.shape[:3]
        and query.shape[1] % keys.shape[1] == 0
        and 0 < query.shape[2] <= keys.shape[2]
        and isinstance(keys, StoredStates) == isinstance(values, StoredStates)
    )


def prompt_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *,
    dtype: torch.dtype = torch.float32, threads: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """softmax(scale * query . keys) . values, where query i of n sees all of T tokens but the last n - 1 - i.

    Args:
        query: float32 or bfloat16 [B, heads, n, D]. keys, values: [B, kv_heads, T, D] of the same dtype, or
            `StoredStates`; heads / kv_heads of the heads share one of keys.
        dtype: in which products are computed, float32 or bfloat16.
        threads: as in `get_backend`, for what makes floats of stored rows.

    Returns:
        [B, heads, n, D] of the query's dtype; the same bits for any number of threads.

    Raises LayoutError for what `supports_prompt_attention` refuses.
    """
    if not supports_prompt_attention(query, keys, values):
        found = ", ".join(f"{x.dtype}{list(x.shape)}" for x in (query, keys, values))
        raise LayoutError(
            "expected float32 or bfloat16 on the CPU, q [B, heads, n, D], k and v [B, kv_heads, T, D] with n <= T;"
            f" found {found}"
        )
    n_new, n_tokens, n_kv_heads = query.shape[2], keys.shape[2], keys.shape[1]
    n_past, group = n_tokens - n_new, query.shape[1] // n_kv_heads
    asked = _turned(query, keys, threads).to(dtype).unflatten(1, (n_kv_heads, group))
    own = [_block(states, n_past, n_tokens, dtype, threads) for states in (keys, values)]
    own = [part.repeat_interleave(group, 1) if group > 1 else part for part in own]
    result, logarithms = _attend(asked.flatten(1, 2), own[0], own[1], scale, causal=True)
    whole = _block_tokens(keys, dtype)
    by_key_heads = asked.flatten(2, 3)  # queries that share keys stand under each other: nothing hides a token
    for first in range(0, n_past, whole):
        block = [_block(states, first, min(n_past, first + whole), dtype, threads) for states in (keys, values)]
        more, its_logarithms = _attend(by_key_heads, block[0], block[1], scale, causal=False)
        more, its_logarithms = more.view_as(result), its_logarithms.view_as(logarithms)
        share = torch.sigmoid(its_logarithms - logarithms)
        result.lerp_(more, share[..., None])
        logarithms = torch.logaddexp(logarithms, its_logarithms)
    return _turned(result, values, threads).to(query.dtype)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [B, heads, n, D] and the logarithm of each query's sum of exponentials, float32 [B, heads, n]."""
    kernel = getattr(torch.ops.aten, FLASH)
    found, logarithms = kernel(query, keys, values, 0.0, causal, attn_mask=None, scale=scale)
    return found.float().contiguous(), logarithms.contiguous()


def _block(states: torch.Tensor, first: int, stop: int, dtype: torch.dtype, threads: int | None) -> torch.Tensor:
    """Tokens from `first` to `stop` as `dtype`."""
    if isinstance(states, StoredStates):
        return states.block(first, stop, dtype, threads)
    return states[..., first:stop, :].to(dtype)


def _block_tokens(keys: torch.Tensor, dtype: torch.dtype) -> int:
    token_bytes = keys.shape[0] * keys.shape[1] * keys.shape[3] * dtype.itemsize
    return max(LEAST_BLOCK_TOKENS, BLOCK_BYTES // token_bytes)


def _turned(floats: torch.Tensor, states: torch.Tensor, threads: int | None) -> torch.Tensor:
    """`floats` [..., D], turned where the rows of `states` are."""
    if isinstance(states, StoredStates) and states.turned:
        return turned(floats, threads)
    return floats


@cache
def _has_kernel() -> bool:
    """Whether this version of torch has the kernel."""
    return hasattr(torch.ops.aten, FLASH)
