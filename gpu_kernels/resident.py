"""Experts that all lie in slots, computed without the host: the device itself looks up which slot a token's expert has.

Nothing here waits or decides on the host, so the work can be recorded into a graph. Each (token, expert) pair is a
group of its own, which for the few tokens of a decode step reads no more than the records of the active experts.
"""

from __future__ import annotations

import torch

from cpu_kernels import ExpertSpec, reference_ffn, unpack_expert
from gpu_kernels.fused_choice import FusedChoice, Group


def run_resident(
    spec: ExpertSpec, slots: torch.Tensor, slot_of: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor,
    weights: torch.Tensor, fused: FusedChoice | None,
) -> torch.Tensor:  # fmt: skip
    """The experts' output [T, H] in hidden's dtype.

    slots uint8 [n_slots, stride]; slot_of int32 [E]: the slot of each expert of the layer; hidden floating [T, H]; ids
    integer [T, k], -1 or >= E: absent; weights floating [T, k]. `fused`: used where its kernels were found right.
    """
    n_tokens, top_k = ids.shape
    flat, n_rows = ids.reshape(-1), ids.numel()
    wide = hidden.float()
    present = (flat >= 0) & (flat < len(slot_of))
    slot_ids = slot_of.index_select(0, torch.where(present, flat, 0))
    scales = torch.where(present, weights.reshape(-1).float(), 0.0)
    if fused is not None and fused.is_right(spec, 1):
        rows = torch.arange(n_rows, device=hidden.device)
        offsets = torch.arange(n_rows + 1, dtype=torch.int32, device=hidden.device)
        out = torch.empty((n_rows, hidden.shape[1]), dtype=torch.float32, device=hidden.device)
        fused.run_known(spec, slots, Group(slot_ids, offsets, rows, [1] * n_rows, wide, scales, top_k, out))
    else:
        records = slots.index_select(0, slot_ids)[:, : spec.record_bytes]
        rows_out = [
            reference_ffn(spec, unpack_expert(spec, records[row]), wide[row // top_k, None]) * scales[row]
            for row in range(n_rows)
        ]
        out = torch.cat(rows_out)
    by_token = out.view(n_tokens, top_k, -1)
    total = by_token[:, 0]
    for j in range(1, top_k):  # the order in which `combine` adds
        total = total + by_token[:, j]
    return total.to(hidden.dtype)
