"""Experts that all lie in slots, computed without the host: the device itself looks up which slot a token's expert has.

Nothing here waits or decides on the host, so the work can be recorded into a graph.
"""

from __future__ import annotations

import torch

from cpu_kernels import ExpertSpec
from gpu_kernels.fused_choice import FusedChoice, Group, RowsOfCall
from gpu_kernels.pairs import Pairs, add_up, run_pairs


def run_resident(
    spec: ExpertSpec, slots: torch.Tensor, slot_of: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor,
    weights: torch.Tensor, fused: FusedChoice | None,
) -> torch.Tensor:  # fmt: skip
    """The experts' output [T, H] in hidden's dtype.

    slots uint8 [n_slots, stride]; slot_of int32 [E]: the slot of each expert of the layer; hidden floating [T, H]; ids
    integer [T, k], -1 or >= E: absent; weights floating [T, k]. `fused`: used where its kernels were found right.
    """
    n_tokens, top_k = ids.shape
    flat = ids.reshape(-1)
    present = (flat >= 0) & (flat < len(slot_of))
    slot_ids = slot_of.index_select(0, torch.where(present, flat, 0))
    scales = torch.where(present, weights.reshape(-1).float(), 0.0)
    pairs = Pairs.of(n_tokens, top_k, hidden.device)
    out = torch.empty((len(flat), hidden.shape[1]), dtype=torch.float32, device=hidden.device)
    run_pairs(spec, slots, slot_ids, hidden.float(), scales, pairs, out, fused)
    return add_up(out, top_k).to(hidden.dtype)


def run_resident_prompt(
    spec: ExpertSpec, slots: torch.Tensor, slot_of: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor,
    weights: torch.Tensor, fused: FusedChoice | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
    """As `run_resident`, each expert's tokens together, so that its record is read for many of them at once; beside the
    output int32 [E + 1], where each expert's rows begin among the rows sorted by experts.

    None where the fused kernel for as many tokens as an expert is expected to have was not found right before.
    """
    (n_tokens, top_k), n_experts = ids.shape, len(slot_of)
    expected = -(-n_tokens * top_k // n_experts)
    if fused is None or not fused.is_right(spec, expected):
        return None
    flat = ids.reshape(-1)
    present = (flat >= 0) & (flat < n_experts)
    by_expert = torch.sort(torch.where(present, flat, n_experts), stable=True)
    experts = torch.arange(n_experts + 1, dtype=flat.dtype, device=flat.device)
    offsets = torch.searchsorted(by_expert.values, experts, out_int32=True)
    out = torch.zeros((len(flat), hidden.shape[1]), dtype=torch.float32, device=hidden.device)
    group = Group(
        slot_of, offsets, by_expert.indices, [expected] * n_experts, hidden.float(),
        torch.where(present, weights.reshape(-1).float(), 0.0), top_k, out, most=len(flat),
    )  # fmt: skip
    fused.run_known(spec, slots, group)
    rows = RowsOfCall(out, None, None, top_k, hidden.dtype)
    return fused.combine(rows, lambda: add_up(out, top_k).to(hidden.dtype)), offsets
