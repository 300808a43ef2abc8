"""Accelerator cache slots: a pure state machine over one pool, keyed by (layer, expert)."""

from __future__ import annotations

from collections import Counter
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled
from scheduler.errors import SlotError

NO_SLOT = -1
NO_KEY = -1


class SlotState(IntEnum):
    """free -> in flight -> resident <-> in use; resident -> free, or evicted: in flight with another expert."""

    FREE = 0
    IN_FLIGHT = 1
    RESIDENT = 2
    IN_USE = 3


FREE, IN_FLIGHT, RESIDENT, IN_USE = (int(state) for state in SlotState)
"""The same as plain integers: an enum member costs a look-up on the hot path."""


class SlotTable:
    """``n_slots`` slots for the experts of ``n_layers`` x ``n_experts``; flat arrays, key = layer * n_experts + expert.

    ``key_of`` int64[n_slots] (-1 empty), ``state`` int64[n_slots], ``slot_of`` int64[n_layers * n_experts] (-1 absent),
    ``claims`` int64[n_slots]: plans that compute from the slot and whose layer has not ended.
    More slots than experts are cut to the number of experts. Every illegal transition raises SlotError and changes
    nothing.
    """

    def __init__(self, n_slots: int, n_layers: int, n_experts: int) -> None:
        if n_slots < 0 or n_layers < 1 or n_experts < 1:
            raise SlotError(f"need n_slots >= 0 and a model, found {n_slots} slots, {n_layers} x {n_experts} experts")
        self.n_layers, self.n_experts = n_layers, n_experts
        self.n_slots = min(n_slots, n_layers * n_experts)
        self.key_of = np.full(self.n_slots, NO_KEY, np.int64)
        self.state = np.zeros(self.n_slots, np.int64)
        self.claims = np.zeros(self.n_slots, np.int64)
        self.slot_of = np.full(n_layers * n_experts, NO_SLOT, np.int64)
        self._overtaken: Counter[tuple[int, int]] = Counter()

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
        return tuple(np.flatnonzero(self.resident_mask(layer)).tolist())

    def resident_mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """bool[n_experts]: experts of a layer whose bytes are there (resident or in use)."""
        slots = self.slot_of[layer * self.n_experts : (layer + 1) * self.n_experts]
        if not self.n_slots:
            return np.zeros(self.n_experts, np.bool_)
        return (slots >= 0) & (self.state[slots] >= RESIDENT)

    def counts(self) -> dict[SlotState, int]:
        """Number of slots in each state."""
        found = np.bincount(self.state, minlength=4)
        return {state: int(found[state]) for state in SlotState}

    def begin_transfer(self, slot: int, key: int) -> int:
        """A free slot, or one whose resident no plan uses, starts to receive ``key``. Returns the evicted key or -1."""
        self._check_absent(key)
        state = self.state[slot]
        if state not in (FREE, RESIDENT) or self.claims[slot]:
            raise SlotError(
                f"slot {slot} is {self._describe(slot)}: only a free or idle resident slot can be rewritten"
            )
        return self._receive(slot, key)

    def chain_transfer(self, slot: int, key: int) -> int:
        """The slot of an expert that a plan computes from receives ``key`` after its last read. Returns the old key.

        The executor owns the wait; a TransferEnded of the old expert may still come and is expected then.
        """
        self._check_absent(key)
        if not self.claims[slot]:
            raise SlotError(f"slot {slot} is {self._describe(slot)}: only a slot that a plan uses can be chained")
        old = int(self.key_of[slot])
        if self.state[slot] == IN_FLIGHT:
            self._overtaken[(slot, old)] += 1
        return self._receive(slot, key)

    def end_transfer(self, slot: int, key: int) -> None:
        """The bytes of ``key`` are in ``slot``: resident, or in use if a plan waits for it."""
        if self._overtaken and self._overtaken[(slot, key)] > 0:
            self._overtaken[(slot, key)] -= 1
            self._overtaken += Counter()
            return
        if not 0 <= slot < self.n_slots or self.key_of[slot] != key or self.state[slot] != IN_FLIGHT:
            expert = divmod(key, self.n_experts)
            raise SlotError(f"no transfer of layer {expert[0]} expert {expert[1]} into slot {slot} is under way")
        self.state[slot] = IN_USE if self.claims[slot] else RESIDENT

    def claim(self, slot: int) -> None:
        """A plan computes from this slot until ``release``."""
        if self.state[slot] == FREE:
            raise SlotError(f"slot {slot} is free: nothing to compute from")
        self.claims[slot] += 1
        if self.state[slot] == RESIDENT:
            self.state[slot] = IN_USE

    def release(self, slot: int) -> None:
        """One plan that used this slot has ended."""
        if self.claims[slot] < 1:
            raise SlotError(f"slot {slot} is {self._describe(slot)}: no plan uses it")
        self.claims[slot] -= 1
        if self.claims[slot] == 0 and self.state[slot] == IN_USE:
            self.state[slot] = RESIDENT

    def claim_all(self, slots: npt.NDArray[np.int64]) -> None:
        """``claim`` for every slot of a plan, in one compiled call."""
        bad = _claim(slots, self.state, self.claims)
        if bad >= 0:
            raise SlotError(f"slot {bad} is free: nothing to compute from")

    def release_all(self, slots: npt.NDArray[np.int64]) -> None:
        """``release`` for every slot of a plan, in one compiled call."""
        bad = _release(slots, self.state, self.claims)
        if bad >= 0:
            raise SlotError(f"slot {bad} is {self._describe(bad)}: no plan uses it")

    def free(self, slot: int) -> int:
        """An idle resident leaves; returns its key."""
        if self.state[slot] != RESIDENT:
            raise SlotError(f"slot {slot} is {self._describe(slot)}: only an idle resident can leave")
        key = int(self.key_of[slot])
        self.slot_of[key] = NO_SLOT
        self.key_of[slot] = NO_KEY
        self.state[slot] = FREE
        return key

    def resize(self, n_slots: int) -> list[int]:
        """Adds free slots at the end, or takes the last ones away; returns the keys that lost theirs.

        Raises SlotError if a slot that would go is in flight or in use: finish the step first.
        """
        if n_slots < 0:
            raise SlotError(f"need n_slots >= 0, found {n_slots}")
        n = min(n_slots, self.slot_of.size)
        for slot in range(n, self.n_slots):
            if self.state[slot] not in (FREE, RESIDENT) or self.claims[slot]:
                raise SlotError(
                    f"slot {slot} is {self._describe(slot)}: a slot in flight or in use cannot be taken away"
                )
        gone = [self.free(slot) for slot in range(n, self.n_slots) if self.state[slot] == RESIDENT]
        extra = max(n - self.n_slots, 0)
        self.key_of = np.concatenate((self.key_of[:n], np.full(extra, NO_KEY, np.int64)))
        self.state = np.concatenate((self.state[:n], np.zeros(extra, np.int64)))
        self.claims = np.concatenate((self.claims[:n], np.zeros(extra, np.int64)))
        self.n_slots = n
        return gone

    def _receive(self, slot: int, key: int) -> int:
        old = int(self.key_of[slot])
        if old != NO_KEY:
            self.slot_of[old] = NO_SLOT
        self.key_of[slot] = key
        self.slot_of[key] = slot
        self.state[slot] = IN_FLIGHT
        return old

    def _check_absent(self, key: int) -> None:
        if self.slot_of[key] != NO_SLOT:
            expert = divmod(key, self.n_experts)
            raise SlotError(f"layer {expert[0]} expert {expert[1]} is already in slot {self.slot_of[key]}")

    def _describe(self, slot: int) -> str:
        occupant = self.occupant(slot)
        held = "" if occupant is None else f" (layer {occupant[0]} expert {occupant[1]})"
        return f"{self.state_of(slot).name.lower().replace('_', ' ')}{held}"


@compiled
def _claim(slots: npt.NDArray[np.int64], state: npt.NDArray[np.int64], claims: npt.NDArray[np.int64]) -> int:
    """Claims all slots, or none and returns the first that is free (-1: done)."""
    for slot in slots:
        if state[slot] == FREE:
            return int(slot)
    for slot in slots:
        claims[slot] += 1
        if state[slot] == RESIDENT:
            state[slot] = IN_USE
    return -1


@compiled
def _release(slots: npt.NDArray[np.int64], state: npt.NDArray[np.int64], claims: npt.NDArray[np.int64]) -> int:
    """Releases all slots; returns the first that nobody had claimed (-1: done)."""
    for slot in slots:
        if claims[slot] < 1:
            return int(slot)
        claims[slot] -= 1
        if claims[slot] == 0 and state[slot] == IN_USE:
            state[slot] = RESIDENT
    return -1
