"""Experts that all lie in slots, computed without the host: the device itself looks up which slot a token's expert has.

Nothing here waits or decides on the host, so the work can be recorded into a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    n_experts = len(slot_of)
    if fused is None or not fused.is_right(spec, expected_tokens(ids.shape, n_experts)):
        return None
    work = PromptWork.of(spec, n_experts, hidden, ids, weights)
    work.run(slots, slot_of, 0, n_experts, fused)
    return work.output(fused), work.offsets


def expected_tokens(shape: torch.Size, n_experts: int) -> int:
    """Tokens of an expert of a layer, for ids [T, k], if all experts have as many."""
    return -(-shape.numel() // n_experts)


@dataclass(frozen=True, slots=True)
class PromptWork:
    """The rows of a call of many tokens sorted by experts, on the device. offsets int32 [E + 1]: where each expert's
    begin in `rows` int64 [T * k]; scales float32, out float32 [T * k, H]: by row; most: rows of an expert at most."""

    spec: ExpertSpec
    offsets: torch.Tensor
    rows: torch.Tensor
    expected: int
    hidden: torch.Tensor
    scales: torch.Tensor
    top_k: int
    out: torch.Tensor
    dtype: torch.dtype
    prepared: dict[ExpertSpec, torch.Tensor]

    @classmethod
    def of(
        cls, spec: ExpertSpec, n_experts: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> PromptWork:
        """hidden floating [T, H]; ids integer [T, k], -1 or >= n_experts: absent; weights floating [T, k]."""
        flat = ids.reshape(-1)
        present = (flat >= 0) & (flat < n_experts)
        by_expert = torch.sort(torch.where(present, flat, n_experts), stable=True)
        experts = torch.arange(n_experts + 1, dtype=flat.dtype, device=flat.device)
        offsets = torch.searchsorted(by_expert.values, experts, out_int32=True)
        out = torch.zeros((len(flat), hidden.shape[1]), dtype=torch.float32, device=hidden.device)
        scales = torch.where(present, weights.reshape(-1).float(), 0.0)
        expected = expected_tokens(ids.shape, n_experts)
        return cls(
            spec, offsets, by_expert.indices, expected, hidden.float(), scales, ids.shape[1], out, hidden.dtype, {}
        )

    def run(self, slots: torch.Tensor, slot_of: torch.Tensor, begin: int, end: int, fused: FusedChoice) -> None:
        """The rows of experts begin to end, each from its slot; slot_of int32 [end - begin]."""
        group = Group(
            slot_of, self.offsets[begin : end + 1], self.rows, [self.expected] * (end - begin), self.hidden,
            self.scales, self.top_k, self.out, most=len(self.rows), prepared=self.prepared,
        )  # fmt: skip
        fused.run_known(self.spec, slots, group)

    def output(self, fused: FusedChoice) -> torch.Tensor:
        """[T, H] in hidden's dtype: each token's rows added, once all experts have run."""
        rows = RowsOfCall(self.out, None, None, self.top_k, self.dtype)
        return fused.combine(rows, lambda: add_up(self.out, self.top_k).to(self.dtype))

    def scores(self, n_experts: int, ids: torch.Tensor) -> torch.Tensor:
        """float32 [E]: each expert's weights added up, over all tokens."""
        flat = ids.reshape(-1)
        places = torch.where((flat >= 0) & (flat < n_experts), flat, n_experts)
        total = torch.zeros(n_experts + 1, dtype=torch.float32, device=flat.device)
        return total.index_add(0, places, self.scales)[:n_experts]
