"""Llama-4's call of its experts: all experts on all tokens, sorted by expert and scaled by their router scores.

`experts(hidden[E * T, H]) -> [E * T, H]`, where row e * T + t is token t times its score for expert e, zero where the
router did not select e. An expert without bias maps a zero row to zero, so only the other rows need to be computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

RoutedExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def run_sorted(hidden: torch.Tensor, num_experts: int, experts: RoutedExperts) -> torch.Tensor:
    """Computes Llama-4's call by the common one.

    hidden: floating [num_experts * T, H]. experts: called once as (rows [N, H], expert ids [N, 1], weights of one
    [N, 1]) with the N rows that are not zero. Returns [num_experts * T, H] in hidden's dtype.
    """
    active = hidden.ne(0).any(dim=-1)
    rows = active.nonzero()[:, 0]
    ids = rows // (len(hidden) // num_experts)
    out = torch.zeros_like(hidden)
    if len(rows):
        out[rows] = experts(hidden[rows], ids[:, None], torch.ones(len(rows), 1, device=hidden.device))
    return out
