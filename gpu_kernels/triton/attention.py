# ruff: noqa: ANN001, ANN201 - what Triton compiles has no Python types
# mypy: ignore-errors
"""Attention of one new token a sequence over a KV cache whose buffers are longer than what they hold.

The tokens held are split over programs, so that a long context fills the card even with few heads; each program keeps
the running maximum and sum of its part (flash decoding), and a second kernel adds the parts. Heads that share keys are
one matrix, so keys and values are read once. How many tokens are held is read on the device: a graph that was recorded
once serves every length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_kernels.triton.launch import COMPILED_WITH

BLOCK_KEYS, LEAST_KEYS = 64, 16
"""Keys that a program takes at once; fewer of those that are longer than LONG_BYTES with their values, so that three
blocks under way fit the shared memory of every card."""
LONG_BYTES = 512
LEAST_HEADS = 16
"""Rows of a matrix product on tensor cores; the heads of a group are padded to it."""
PROGRAMS = 264
"""Programs that fill a card: two for each of 132 multiprocessors."""
MAX_SPLITS = 64
ANY_CALL = {"do_not_specialize": ["n_heads", "room", "first"], "do_not_specialize_on_alignment": ["n_past_ptr"]}


@triton.jit(**ANY_CALL)
def part_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, n_past_ptr, acc_ptr, max_ptr, sum_ptr,
    q_sequence, q_head, k_sequence, k_head, k_token, v_sequence, v_head, v_token, mask_sequence,
    n_heads, room, first, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, V_SIZE: tl.constexpr,
    V_PADDED: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Part `split` of the keys, for the GROUP query heads of one key head of one sequence (program (sequence and key
    head, split)): acc float32 [B * heads, SPLITS, V_SIZE], max and sum [B * heads, SPLITS]."""
    kv_heads = n_heads // GROUP
    at, split = tl.program_id(0), tl.program_id(1)
    sequence, kv_head = at // kv_heads, at % kv_heads
    n_keys = tl.minimum(tl.load(n_past_ptr).to(tl.int32) + 1 - first, room)
    per_split = tl.cdiv(tl.cdiv(n_keys, SPLITS), KEYS) * KEYS
    begin = split * per_split
    end = tl.minimum(begin + per_split, n_keys)
    rows = tl.arange(0, ROWS)
    columns, v_columns = tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    heads = kv_head * GROUP + rows
    q_at = q_ptr + sequence * q_sequence + heads[:, None] * q_head + columns[None, :]
    q = tl.load(q_at, mask=(rows < GROUP)[:, None] & (columns < SIZE)[None, :], other=0.0)
    k_base = k_ptr + sequence.to(tl.int64) * k_sequence + kv_head * k_head
    v_base = v_ptr + sequence.to(tl.int64) * v_sequence + kv_head * v_head
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V_PADDED), tl.float32)
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        inside = keys < end
        k_at = k_base + keys[None, :].to(tl.int64) * k_token + columns[:, None]
        k = tl.load(k_at, mask=inside[None, :] & (columns < SIZE)[:, None], other=0.0)
        if EXACT:
            scores = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee") * scale
        else:
            scores = tl.dot(q, k) * scale
        if MASKED:
            seen = tl.load(mask_ptr + sequence * mask_sequence + keys, mask=inside, other=0) != 0
        else:
            seen = inside
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        safe = tl.where(new_highest == -float("inf"), 0.0, new_highest)
        weights = tl.exp(scores - safe[:, None])
        keep = tl.exp(highest - safe)
        v_at = v_base + keys[:, None].to(tl.int64) * v_token + v_columns[None, :]
        v = tl.load(v_at, mask=inside[:, None] & (v_columns < V_SIZE)[None, :], other=0.0)
        if EXACT:
            added = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
        else:
            added = tl.dot(weights.to(v.dtype), v)
        acc = acc * keep[:, None] + added
        total = total * keep + tl.sum(weights, axis=1)
        highest = new_highest
    out = (sequence * n_heads + heads) * SPLITS + split
    tl.store(max_ptr + out, highest, mask=rows < GROUP)
    tl.store(sum_ptr + out, total, mask=rows < GROUP)
    acc_at = acc_ptr + out[:, None] * V_SIZE + v_columns[None, :]
    tl.store(acc_at, acc, mask=(rows < GROUP)[:, None] & (v_columns < V_SIZE)[None, :])


@triton.jit
def join_kernel(
    acc_ptr, max_ptr, sum_ptr, out_ptr, SPLITS: tl.constexpr, V_SIZE: tl.constexpr, V_PADDED: tl.constexpr
):  # fmt: skip
    """out [B * heads, V_SIZE] of all parts of one head of one sequence."""
    at = tl.program_id(0)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, V_PADDED)
    highest = tl.load(max_ptr + at * SPLITS + splits)
    overall = tl.max(highest, axis=0)
    weights = tl.exp(highest - tl.where(overall == -float("inf"), 0.0, overall))
    total = tl.sum(weights * tl.load(sum_ptr + at * SPLITS + splits), axis=0)
    inside = columns < V_SIZE
    parts = tl.load(
        acc_ptr + (at * SPLITS + splits)[:, None] * V_SIZE + columns[None, :], mask=inside[None, :], other=0.0
    )  # fmt: skip
    result = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + at * V_SIZE + columns, result.to(out_ptr.dtype.element_ty), mask=inside)


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, n_past: torch.Tensor,
    first: int, scale: float, *, exact: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """[B, 1, heads, V] in the query's dtype. exact: products in float32, which None takes for float32 only.

    query [B, heads, 1, D]; keys, values [B, kv_heads, room, D or V], rows contiguous, of which the first hold token
    `first` and following ones; mask bool [B or 1, 1, 1, room], True where a token is seen; n_past int64: tokens before
    the new one, whose keys and values are in the cache already.
    """
    n_sequences, n_heads, _, size = query.shape
    kv_heads, room, v_size = keys.shape[1], keys.shape[2], values.shape[3]
    group = n_heads // kv_heads
    n_splits = splits_for(n_sequences * kv_heads, room)
    query = query if query.stride(-1) == 1 else query.contiguous()
    rows = n_sequences * n_heads
    acc = torch.empty((rows, n_splits, v_size), dtype=torch.float32, device=query.device)
    highest, total = torch.empty((2, rows, n_splits), dtype=torch.float32, device=query.device)
    out = torch.empty((n_sequences, 1, n_heads, v_size), dtype=query.dtype, device=query.device)
    seen = None if mask is None else mask.view(torch.uint8)
    exact = query.dtype == torch.float32 if exact is None else exact
    padded, v_padded = (max(LEAST_HEADS, triton.next_power_of_2(each)) for each in (size, v_size))
    part_kernel[(n_sequences * kv_heads, n_splits)](
        query, keys, values, n_past if seen is None else seen, n_past, acc, highest, total,
        query.stride(0), query.stride(1), *keys.stride()[:3], *values.stride()[:3],
        0 if seen is None or len(seen) == 1 else seen.stride(0), n_heads, room, first, scale,
        GROUP=group, ROWS=max(LEAST_HEADS, triton.next_power_of_2(group)), SIZE=size,
        PADDED=padded, V_SIZE=v_size, V_PADDED=v_padded, KEYS=keys_at_once((padded + v_padded) * keys.element_size()),
        SPLITS=n_splits, MASKED=seen is not None, EXACT=exact, **COMPILED_WITH,
    )  # fmt: skip
    join_kernel[(rows,)](
        acc, highest, total, out, SPLITS=n_splits, V_SIZE=v_size, V_PADDED=v_padded, **COMPILED_WITH
    )  # fmt: skip
    return out


def splits_for(n_programs: int, room: int) -> int:
    """Into how many parts `room` keys are split where each is read by `n_programs` programs: a power of two."""
    wanted = max(1, min(PROGRAMS // max(1, n_programs), room // BLOCK_KEYS, MAX_SPLITS))
    return 1 << (wanted.bit_length() - 1)


def keys_at_once(n_bytes: int) -> int:
    """Keys of a block where one takes so many bytes, with its value: a power of two."""
    return max(LEAST_KEYS, min(BLOCK_KEYS, BLOCK_KEYS * LONG_BYTES // triton.next_power_of_2(n_bytes)))
