"""Rows of (token, expert) pairs, each a group of its own, without the host: what a graph of the device can hold.

For the few tokens of a decode step that reads no more than the records of the active experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpu_kernels import ExpertSpec, reference_ffn, unpack_expert
from gpu_kernels.fused_choice import FusedChoice, Group


@dataclass(frozen=True, slots=True)
class Pairs:
    """Row numbers int64 [R] and ends of one-row groups int32 [R + 1] of R = n_tokens * top_k pairs, on the device."""

    top_k: int
    rows: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, n_tokens: int, top_k: int, device: torch.device) -> Pairs:
        """All pairs of so many tokens."""
        n_rows = n_tokens * top_k
        offsets = torch.arange(n_rows + 1, dtype=torch.int32, device=device)
        return cls(top_k, torch.arange(n_rows, device=device), offsets)


def run_pairs(
    spec: ExpertSpec, slots: torch.Tensor, slot_ids: torch.Tensor, hidden: torch.Tensor, scales: torch.Tensor,
    pairs: Pairs, out: torch.Tensor, fused: FusedChoice | None,
) -> None:  # fmt: skip
    """Writes out float32 [R, H]: each pair's row, times its scale float32 [R].

    slots uint8 [n_slots, stride]; slot_ids int32 [R], negative: the pair's row in `out` has no meaning; hidden float32
    [T, H]. `fused`: used where its kernels were found right.
    """
    n_rows = len(slot_ids)
    if fused is not None and fused.is_right(spec, 1):
        group = Group(slot_ids, pairs.offsets, pairs.rows, [1] * n_rows, hidden, scales, pairs.top_k, out)
        fused.run_known(spec, slots, group)
        return
    records = slots.index_select(0, slot_ids.clamp(min=0))[:, : spec.record_bytes]
    for row in range(n_rows):
        result = reference_ffn(spec, unpack_expert(spec, records[row]), hidden[row // pairs.top_k, None])
        out[row : row + 1] = result * scales[row]


def add_up(rows: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T, H]: each token's rows of float32 [T * top_k, H], added in the order in which all lanes add."""
    by_token = rows.view(-1, top_k, rows.shape[1])
    total = by_token[:, 0]
    for j in range(1, top_k):
        total = total + by_token[:, j]
    return total
