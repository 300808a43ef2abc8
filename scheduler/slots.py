"""Accelerator cache slots: a pure state machine over one pool, keyed by (layer, expert)."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from scheduler.errors import SlotError

NO_SLOT = -1
NO_KEY = -1


class SlotState(IntEnum):
    """free -> in flight -> resident <-> in use; resident -> free or (evicted) in flight again."""

    FREE = 0
    IN_FLIGHT = 1
    RESIDENT = 2
    IN_USE = 3


class SlotTable:
    """``n_slots`` slots for the experts of ``n_layers`` x ``n_experts``; flat arrays, key = layer * n_experts + expert.

    ``key_of`` int32[n_slots] (-1 empty), ``state`` uint8[n_slots], ``slot_of`` int32[n_layers * n_experts] (-1 absent),
    ``claimed`` bool[n_slots]: a plan whose layer has not ended computes from this slot.
    Every illegal transition raises SlotError and changes nothing.
    """

    def __init__(self, n_slots: int, n_layers: int, n_experts: int) -> None:
        if n_slots < 0 or n_layers < 1 or n_experts < 1:
            raise SlotError(f"need n_slots >= 0 and a model, found {n_slots} slots, {n_layers} x {n_experts} experts")
        self.n_layers, self.n_experts = n_layers, n_experts
        self.n_slots = min(n_slots, n_layers * n_experts)
        self.key_of = np.full(self.n_slots, NO_KEY, np.int32)
        self.state = np.zeros(self.n_slots, np.uint8)
        self.claimed = np.zeros(self.n_slots, np.bool_)
        self.slot_of = np.full(n_layers * n_experts, NO_SLOT, np.int32)

    def slot(self, layer: int, expert: int) -> int:
        """The slot that holds or will hold this expert, or -1."""
        return int(self.slot_of[layer * self.n_experts + expert])

    def state_of(self, slot: int) -> SlotState:
        """State of one slot."""
        return SlotState(int(self.state[slot]))

    def occupant(self, slot: int) -> tuple[int, int] | None:
        """(layer, expert) of a slot, or None."""
        key = int(self.key_of[slot])
        return None if key == NO_KEY else divmod(key, self.n_experts)

    def resident(self, layer: int) -> tuple[int, ...]:
        """Experts of a layer whose bytes are there (resident or in use), ascending."""
        slots = self.slot_of[layer * self.n_experts : (layer + 1) * self.n_experts]
        held = np.flatnonzero(slots >= 0)
        return tuple(int(e) for e in held if self.state[slots[e]] >= SlotState.RESIDENT)

    def counts(self) -> dict[SlotState, int]:
        """Number of slots in each state."""
        found = np.bincount(self.state, minlength=4)
        return {state: int(found[state]) for state in SlotState}
