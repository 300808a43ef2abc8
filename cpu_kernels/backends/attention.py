"""Attention of a decode step on the CPU: one new token against bfloat16 keys and values, each read once.

PyTorch's scaled_dot_product_attention for bfloat16 on CPUs is made for many queries: with one it took 2.6 ms for 500
cached tokens of 16 heads, where reading them takes 0.2 ms (measured, Zen 4). Sums are kept in float32 here.
"""

from functools import cache

import numpy as np
import torch

from cpu_kernels.backends.shared import shared_backend
from cpu_kernels.engine.attention_workers import ATTEND_WORK
from cpu_kernels.errors import LayoutError
from cpu_kernels.host.isa import detect
from cpu_kernels.simd.attention import HEAD_BLOCK, LOWEST, AttendKernel
from cpu_kernels.simd.compile import kernel_address

BYTES = 2
"""Of a bfloat16."""


def supports_decode_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `decode_attention` takes these: bfloat16 on the CPU, one query token, head sizes of whole vectors."""
    lanes = _lanes()
    return (
        query.dtype == keys.dtype == values.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.dim() == keys.dim() == values.dim() == 4
        and query.shape[2] == 1
        and keys.shape[2] > 0
        and keys.shape[3] % lanes == 0 == values.shape[3] % lanes
        and query.shape[1] % keys.shape[1] == 0
        and keys.stride(3) == values.stride(3) == 1
    )


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """softmax(scale * query . keys + bias) . values for one new token.

    Args:
        query: bfloat16 [B, heads, 1, D]. keys: bfloat16 [B, kv_heads, T, D]; heads / kv_heads of them share one.
            values: bfloat16 [B, kv_heads, T, V]. The last dimension is contiguous, the others have any stride.
        bias: float [B, T], added to the scores of all heads; -inf masks a token.
        threads: as in `get_backend`.

    Returns:
        bfloat16 [B, heads, 1, V]; the same bits for any number of threads.

    Raises LayoutError for what `supports_decode_attention` refuses and for sizes that do not fit together.
    """
    _check(query, keys, values, bias)
    n_batch, n_heads, _, dim = query.shape
    _, n_kv_heads, n_tokens, v_dim = values.shape
    out = torch.empty(n_batch, n_heads, 1, v_dim, dtype=torch.bfloat16)
    shared_backend(threads).attend(
        _kernels(),
        (n_batch, n_kv_heads, n_heads // n_kv_heads, n_tokens, dim, v_dim),
        scale, _bits(query.contiguous()), _places(keys), _places(values),
        _NOTHING if bias is None else bias.to(torch.float32).clamp(min=LOWEST).contiguous().view(-1).numpy(),
        _bits(out), BYTES * (keys.numel() + values.numel()),
    )  # fmt: skip
    return out


_NOTHING = np.empty(0, np.float32)


def _bits(x: torch.Tensor) -> np.ndarray:
    """bfloat16 as int16 [numel], the same memory."""
    array: np.ndarray = x.view(-1).view(torch.int16).numpy()
    return array


def _places(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, and the bytes from one batch, head and token to the next."""
    batch, head, token, _ = x.stride()
    return x.data_ptr(), BYTES * batch, BYTES * head, BYTES * token


@cache
def _kernels() -> tuple[int, int, int]:
    """Addresses of the machine code, which is compiled (or loaded) for this CPU's path."""
    name = detect().isa.name
    shared, single = kernel_address(AttendKernel(HEAD_BLOCK), name), kernel_address(AttendKernel(1), name)
    return shared, single, ATTEND_WORK.address


@cache
def _lanes() -> int:
    return detect().isa.lanes


def _check(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> None:
    if not supports_decode_attention(query, keys, values):
        raise LayoutError(
            "expected bfloat16 on the CPU, q [B, heads, 1, D], k [B, kv_heads, T, D], v [B, kv_heads, T, V], D and V"
            f" multiples of {_lanes()}; found {_found(query, keys, values)}"
        )
    if query.shape[0] != keys.shape[0] or query.shape[3] != keys.shape[3] or keys.shape[:3] != values.shape[:3]:
        raise LayoutError(f"batch, heads, tokens or head size do not fit together: {_found(query, keys, values)}")
    if bias is not None and tuple(bias.shape) != (keys.shape[0], keys.shape[2]):
        raise LayoutError(f"expected bias [{keys.shape[0]}, {keys.shape[2]}], found {list(bias.shape)}")


def _found(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> str:
    named = zip("qkv", (query, keys, values), strict=True)
    return ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in named)
