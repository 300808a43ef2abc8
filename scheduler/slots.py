"""Accelerator cache slots: a pure state machine over one pool, keyed by (layer, expert); the owner of their contents.

A slot is in one of four states; six named transitions lead from one to the next:

| event          | from                        | to                                                  |
|----------------|-----------------------------|-----------------------------------------------------|
| begin_transfer | FREE, RESIDENT              | IN_FLIGHT; a resident loses the slot (eviction)     |
| end_transfer   | IN_FLIGHT                   | RESIDENT, or PINNED where a plan waits for it       |
| pin            | IN_FLIGHT, RESIDENT, PINNED | PINNED, once the bytes are there                    |
| unpin          | PINNED, IN_FLIGHT           | RESIDENT with the last pin, once the bytes are there|
| hand_over      | PINNED, IN_FLIGHT (pinned)  | IN_FLIGHT with the next expert of the same plan     |
| free           | RESIDENT                    | FREE                                                |

A pin says that a plan computes from the slot and its layer has not ended. It may be set while the transfer is under way
(the slot is PINNED once that has ended). ``hand_over`` gives a pinned slot to the next expert of the same plan, whose
copy waits for the last read of the one before.
"""

from __future__ import annotations

from collections import Counter
from enum import IntEnum
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled, straight
from scheduler.errors import SlotError

Ints = npt.NDArray[np.int64]

NO_SLOT = -1
NO_KEY = -1
STORY_EVENTS: Final = 1024
"""Latest events that a table remembers, for its errors; one for each slot that is pinned or let go of."""
STORY_LINES: Final = 8
"""Of those, at most so many that concern the slot or the expert are printed."""

EventName = Literal["begin_transfer", "hand_over", "end_transfer", "overtaken", "pin", "unpin", "free", "resize"]
EVENT_NAMES: Final[tuple[EventName, ...]] = get_args(EventName)
BEGIN_TRANSFER, HAND_OVER, END_TRANSFER, OVERTAKEN, PIN, UNPIN, FREED, RESIZE = range(8)
"""The same as numbers, as a table's ``told`` has them."""


class SlotState(IntEnum):
    """free -> in flight -> resident <-> pinned; resident -> free, or evicted: in flight with another expert."""

    FREE = 0
    IN_FLIGHT = 1
    RESIDENT = 2
    PINNED = 3


FREE, IN_FLIGHT, RESIDENT, PINNED = (int(state) for state in SlotState)
"""The same as plain integers: an enum member costs a look-up on the hot path."""


class SlotTable:
    """``n_slots`` slots for the experts of ``n_layers`` x ``n_experts``; flat arrays, key = layer * n_experts + expert.

    ``key_of`` int64[n_slots] (-1 empty), ``state`` int64[n_slots], ``slot_of`` int64[n_layers * n_experts] (-1 absent),
    ``pins`` int64[n_slots]: plans that compute from the slot and whose layer has not ended.
    More slots than experts are cut to the number of experts. Every illegal transition raises SlotError, which tells the
    last events of slot and expert, and changes nothing. ``first_layer``, ``first_slot``: what messages add to numbers.
    """

    validating: bool = False
    """Whether tables validate themselves after every event: in tests, and where HYBRIMOE_DEBUG is set."""

    def __init__(self, n_slots: int, n_layers: int, n_experts: int, first_layer: int = 0, first_slot: int = 0) -> None:
        if n_slots < 0 or n_layers < 1 or n_experts < 1:
            raise SlotError(f"need n_slots >= 0 and a model, found {n_slots} slots, {n_layers} x {n_experts} experts")
        self.n_layers, self.n_experts = n_layers, n_experts
        self.first_layer, self.first_slot = first_layer, first_slot
        self.n_slots = min(n_slots, n_layers * n_experts)
        self.key_of = np.full(self.n_slots, NO_KEY, np.int64)
        self.state = np.zeros(self.n_slots, np.int64)
        self.pins = np.zeros(self.n_slots, np.int64)
        self.slot_of = np.full(n_layers * n_experts, NO_SLOT, np.int64)
        self._overtaken: Counter[tuple[int, int]] = Counter()
        self.told = np.zeros((STORY_EVENTS + 1, 3), np.int64)
        """Latest (event, slot, key or NO_KEY), for ``story``, in a ring behind row 0, which begins with how many there
        were; who performs one tells it by ``tell``."""
        self._tell = tell

    # Looking ----------------------------------------------------------------------------------------------------

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
        """Experts of a layer whose bytes are there (resident or pinned), ascending."""
        return tuple(np.flatnonzero(self.resident_mask(layer)).tolist())

    def resident_mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """bool[n_experts]: experts of a layer whose bytes are there (resident or pinned)."""
        slots = self.slot_of[layer * self.n_experts : (layer + 1) * self.n_experts]
        if not self.n_slots:
            return np.zeros(self.n_experts, np.bool_)
        return (slots >= 0) & (self.state[slots] >= RESIDENT)

    def contents(self) -> dict[int, tuple[int, int]]:
        """Slot -> (layer, expert) that it holds, or will once its transfer ends; numbers as in messages."""
        filled = ((slot, self.occupant(slot)) for slot in range(self.n_slots))
        return {slot + self.first_slot: (own[0] + self.first_layer, own[1]) for slot, own in filled if own is not None}

    def counts(self) -> dict[SlotState, int]:
        """Number of slots in each state."""
        found = np.bincount(self.state, minlength=4)
        return {state: int(found[state]) for state in SlotState}

    def story(self, slot: int | None = None, key: int | None = None) -> list[str]:
        """The latest events of a slot or of an expert (of either, where both are given), oldest first."""
        lines = []
        for event, at, moved in self.events():
            if at == slot or (key is not None and moved == key):
                expert = "" if moved == NO_KEY else f" {self._expert(moved)}"
                lines.append(f"{event}{expert} slot {at + self.first_slot}")
        return lines[-STORY_LINES:]

    def events(self) -> list[tuple[EventName, int, int]]:
        """The latest (event, slot, key or NO_KEY), oldest first."""
        n = int(self.told[0, 0])
        rows = np.roll(self.told[1:], -n, axis=0)[-n:] if n else self.told[:0]
        return [(EVENT_NAMES[event], slot, key) for event, slot, key in rows.tolist()]

    def validate(self) -> None:
        """Raises SlotError where the table contradicts itself: after each event in tests and under HYBRIMOE_DEBUG."""
        state, pins, filled = self.state, self.pins, self.key_of >= 0
        allowed = (
            ((state == FREE) & ~filled & (pins == 0))
            | ((state == IN_FLIGHT) & filled & (pins >= 0))
            | ((state == RESIDENT) & filled & (pins == 0))
            | ((state == PINNED) & filled & (pins > 0))
        )
        if not allowed.all():
            slot = int(allowed.argmin())
            raise self._refused(f"slot {self._at(slot)} cannot be with {pins[slot]} pins", slot)
        slots = np.flatnonzero(filled)
        n_known = np.count_nonzero(self.slot_of >= 0)
        if n_known != slots.size or not np.array_equal(self.slot_of[self.key_of[slots]], slots):
            raise SlotError("slots and experts disagree: an expert is in two slots, or a slot has another one's expert")

    # Transitions ------------------------------------------------------------------------------------------------

    def begin_transfer(self, slot: int, key: int) -> int:
        """A free slot, or one whose resident no plan uses, starts to receive ``key``. Returns the evicted key or -1."""
        if self.slot_of[key] != NO_SLOT:
            self._check_absent(key)
        state = self.state[slot]
        if state not in (FREE, RESIDENT) or self.pins[slot]:
            raise self._refused(
                f"slot {self._at(slot)}: only a free slot or a resident without a pin can be rewritten", slot, key
            )
        return self._receive(BEGIN_TRANSFER, slot, key)

    def hand_over(self, slot: int, key: int) -> int:
        """The slot of an expert that a plan computes from receives ``key`` after its last read. Returns the old key.

        The executor owns the wait; a TransferEnded of the old expert may still come and is expected then.
        """
        self._check_absent(key)
        if not self.pins[slot]:
            raise self._refused(f"slot {self._at(slot)}: only a slot that a plan uses can be handed over", slot, key)
        old = int(self.key_of[slot])
        if self.state[slot] == IN_FLIGHT:
            self._overtaken[(slot, old)] += 1
        return self._receive(HAND_OVER, slot, key)

    def end_transfer(self, slot: int, key: int) -> None:
        """The bytes of ``key`` are in ``slot``: resident, or pinned if a plan waits for it."""
        if self._overtaken and self._overtaken[(slot, key)] > 0:
            self._overtaken[(slot, key)] -= 1
            self._overtaken += Counter()
            self._happened(OVERTAKEN, slot, key)
            return
        if not 0 <= slot < self.n_slots or self.key_of[slot] != key or self.state[slot] != IN_FLIGHT:
            raise self.not_under_way(slot, key)
        self.state[slot] = PINNED if self.pins[slot] else RESIDENT
        self._happened(END_TRANSFER, slot, key)

    @property
    def overtaking(self) -> bool:
        """Whether transfers are under way whose slot has been handed over since: their end is told in Python."""
        return bool(self._overtaken)

    def not_under_way(self, slot: int, key: int) -> SlotError:
        """What ``land`` has found: no such transfer."""
        reason = f"no transfer of {self._expert(key)} into slot {slot + self.first_slot} is under way"
        return self._refused(reason, slot, key)

    def pin(self, slot: int) -> None:
        """A plan computes from this slot until ``unpin``."""
        if self.state[slot] == FREE:
            raise self._refused(f"slot {self._at(slot)}: nothing to compute from", slot)
        self.pins[slot] += 1
        if self.state[slot] == RESIDENT:
            self.state[slot] = PINNED
        self._happened(PIN, slot)

    def unpin(self, slot: int) -> None:
        """One plan that used this slot has ended."""
        if self.pins[slot] < 1:
            raise self._refused(f"slot {self._at(slot)}: no plan uses it", slot)
        self.pins[slot] -= 1
        if self.pins[slot] == 0 and self.state[slot] == PINNED:
            self.state[slot] = RESIDENT
        self._happened(UNPIN, slot)

    def pin_all(self, slots: npt.NDArray[np.int64]) -> None:
        """``pin`` for every slot of a plan, in one compiled call."""
        bad = _pin(slots, self.state, self.pins, self.told)
        if bad >= 0:
            raise self._refused(f"slot {self._at(bad)}: nothing to compute from", bad)
        if self.validating:
            self.validate()

    def not_pinned(self, slot: int) -> SlotError:
        """What ``unpin_slot`` has found: a plan lets go of a slot that no plan uses."""
        return self._refused(f"slot {self._at(slot)}: no plan uses it", slot)

    def free(self, slot: int) -> int:
        """A resident without a pin leaves; returns its key."""
        if self.state[slot] != RESIDENT:
            raise self._refused(f"slot {self._at(slot)}: only an idle resident can leave", slot)
        key = int(self.key_of[slot])
        self.slot_of[key] = NO_SLOT
        self.key_of[slot] = NO_KEY
        self.state[slot] = FREE
        self._happened(FREED, slot, key)
        return key

    def resize(self, n_slots: int) -> list[int]:
        """Adds free slots at the end, or takes the last ones away; returns the keys that lost theirs.

        Raises SlotError if a slot that would go is in flight or pinned: finish the step first.
        """
        if n_slots < 0:
            raise SlotError(f"need n_slots >= 0, found {n_slots}")
        n = min(n_slots, self.slot_of.size)
        for slot in range(n, self.n_slots):
            if self.state[slot] not in (FREE, RESIDENT) or self.pins[slot]:
                raise self._refused(f"slot {self._at(slot)}: a slot in flight or pinned cannot be taken away", slot)
        gone = [self.free(slot) for slot in range(n, self.n_slots) if self.state[slot] == RESIDENT]
        extra = max(n - self.n_slots, 0)
        self.key_of = np.concatenate((self.key_of[:n], np.full(extra, NO_KEY, np.int64)))
        self.state = np.concatenate((self.state[:n], np.zeros(extra, np.int64)))
        self.pins = np.concatenate((self.pins[:n], np.zeros(extra, np.int64)))
        self.n_slots = n
        self._happened(RESIZE, n)
        return gone

    # Inside -----------------------------------------------------------------------------------------------------

    def _receive(self, event: int, slot: int, key: int) -> int:
        old = int(self.key_of[slot])
        if old != NO_KEY:
            self.slot_of[old] = NO_SLOT
        self.key_of[slot] = key
        self.slot_of[key] = slot
        self.state[slot] = IN_FLIGHT
        self._happened(event, slot, key)
        return old

    def _happened(self, event: int, slot: int, key: int = NO_KEY) -> None:
        self._tell(self.told, event, slot, key)
        if self._tell is tell:
            self._tell = straight(tell)
        if self.validating:
            self.validate()

    def _check_absent(self, key: int) -> None:
        if self.slot_of[key] != NO_SLOT:
            slot = int(self.slot_of[key])
            raise self._refused(f"{self._expert(key)} is already in slot {slot + self.first_slot}", slot, key)

    def _refused(self, reason: str, slot: int, key: int | None = None) -> SlotError:
        """The error, with what happened to slot and expert before."""
        told = self.story(slot, key)
        return SlotError(f"{reason}; latest events: {'; '.join(told) if told else 'none'}")

    def _expert(self, key: int) -> str:
        layer, expert = divmod(key, self.n_experts)
        return f"layer {layer + self.first_layer} expert {expert}"

    def _at(self, slot: int) -> str:
        key = int(self.key_of[slot])
        holding = "" if key == NO_KEY else f" ({self._expert(key)})"
        return f"{slot + self.first_slot} is {self.state_of(slot).name.lower().replace('_', ' ')}{holding}"


@compiled
def tell(told: Ints, event: int, slot: int, key: int) -> None:
    """Adds an event to a table's ``told``."""
    at = 1 + told[0, 0] % (told.shape[0] - 1)
    told[at, 0], told[at, 1], told[at, 2] = event, slot, key
    told[0, 0] += 1


@compiled
def land(slot: int, key: int, key_of: Ints, state: Ints, pins: Ints, told: Ints) -> bool:
    """``SlotTable.end_transfer``, on a table's arrays. Returns whether there was such a transfer; nothing has happened
    where there was none, and who calls it raises ``SlotTable.not_under_way``."""
    if not 0 <= slot < key_of.size or key_of[slot] != key or state[slot] != IN_FLIGHT:
        return False
    state[slot] = PINNED if pins[slot] > 0 else RESIDENT
    tell(told, END_TRANSFER, slot, key)
    return True


@compiled
def _pin(slots: Ints, state: Ints, pins: Ints, told: Ints) -> int:
    """Pins all slots, or none and returns the first that is free (-1: done)."""
    for slot in slots:
        if state[slot] == FREE:
            return int(slot)
    for slot in slots:
        pin_slot(slot, state, pins, told)
    return -1


@compiled
def pin_slot(slot: int, state: Ints, pins: Ints, told: Ints) -> None:
    """``SlotTable.pin`` of a slot that is not free, on a table's arrays."""
    pins[slot] += 1
    if state[slot] == RESIDENT:
        state[slot] = PINNED
    tell(told, PIN, slot, NO_KEY)


@compiled
def unpin_slot(slot: int, state: Ints, pins: Ints, told: Ints) -> bool:
    """``SlotTable.unpin`` on a table's arrays. Returns whether a plan had pinned the slot; nothing has happened where
    none had, and who calls it raises ``SlotTable.not_pinned``."""
    if pins[slot] < 1:
        return False
    pins[slot] -= 1
    if pins[slot] == 0 and state[slot] == PINNED:
        state[slot] = RESIDENT
    tell(told, UNPIN, slot, NO_KEY)
    return True


@compiled
def free_slot(slot: int, slot_of: Ints, key_of: Ints, state: Ints, told: Ints) -> None:
    """``SlotTable.free`` of a resident without a pin, on a table's arrays."""
    key = key_of[slot]
    slot_of[key], key_of[slot], state[slot] = NO_SLOT, NO_KEY, FREE
    tell(told, FREED, slot, key)
