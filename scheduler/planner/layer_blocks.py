"""Which accelerator has which layers and slots, where there are several.

The rule: each accelerator gets a contiguous block of layers with all their experts (as in KTransformers' multi-GPU rule
files and llama.cpp's ``--split-mode layer``: hidden states cross once a block). Blocks are in proportion to the given
shares, counted in experts that may have a slot, rounded so that the first ones are larger. Slots are shared out in
proportion to those experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from scheduler.errors import DemandError

ROUNDING: Final = 1e-9
"""Relative; a block that fills its share but for rounding of floats is full."""


class Block(NamedTuple):
    """Layers and slots of one accelerator, as ranges of the whole."""

    first_layer: int
    n_layers: int
    first_slot: int
    n_slots: int


def blocks(n_layers: int, n_slots: int, n_accelerators: int) -> list[Block]:
    """Equal accelerators for layers of equal size. Raises DemandError for more accelerators than layers."""
    sizes = [1] * n_layers
    counts = layers_of(sizes, [1.0] * n_accelerators)
    return joined(counts, slots_of(sizes, counts, n_slots))


def layers_of(n_experts: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Number of layers of each accelerator. ``n_experts``: of each layer, how many may have a slot.

    ``shares`` may have any unit. Raises DemandError for more accelerators than layers.
    """
    n_layers, n_accelerators = len(n_experts), len(shares)
    if not 1 <= n_accelerators <= n_layers:
        raise DemandError(f"{n_accelerators} accelerators for {n_layers} MoE layers: each needs at least one")
    until = list(accumulate(n_experts))
    wanted = [until[-1] * share / max(sum(shares), ROUNDING) for share in accumulate(shares)]
    counts: list[int] = []
    for accelerator, target in enumerate(wanted[:-1]):
        first = sum(counts)
        end = next((at + 1 for at, total in enumerate(until) if total >= target * (1.0 - ROUNDING)), n_layers)
        counts.append(min(max(end, first + 1), n_layers - (n_accelerators - 1 - accelerator)) - first)
    return [*counts, n_layers - sum(counts)]


def slots_of(n_experts: Sequence[int], counts: Sequence[int], n_slots: int) -> list[int]:
    """Slots of each accelerator, in proportion to the experts of its ``counts`` layers that may have one."""
    before = list(accumulate(n_experts, initial=0))
    until = [round(n_slots * before[end] / max(before[-1], 1)) for end in accumulate(counts, initial=0)]
    return [end - first for first, end in pairwise(until)]


def joined(counts: Sequence[int], slots: Sequence[int]) -> list[Block]:
    """Blocks from the layers and slots of each accelerator."""
    first_layers, first_slots = (list(accumulate(sizes, initial=0)) for sizes in (counts, slots))
    return [Block(first_layers[u], n, first_slots[u], slots[u]) for u, n in enumerate(counts)]
