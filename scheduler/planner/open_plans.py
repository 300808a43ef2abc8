"""Plans whose layers have not ended: which slots each has pinned, which of them it leaves free, on flat arrays.

A compiled decision opens its plan, and ends the plan of the layer before, without a Python object of either.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.compiled import compiled, straight
from scheduler.slots import RESIDENT, STORY_EVENTS, SlotTable, free_slot, unpin_slot
from scheduler.views import floats_at, ints_at

Ints = npt.NDArray[np.int64]

FIRST_DEPTH = 4
"""Open plans of a layer that there is room for at first; a layer that is run to its end each time has one."""
FIRST, COUNT, N_TURNS = range(3)
"""Of a layer, in ``OpenPlans.turns``: the place of its oldest open plan, and how many are open."""
N_PINNED, N_LEAVING, SLOTS = range(3)
"""Of a plan, in ``OpenPlans.plans``: how many slots it has pinned and how many of them are left free at its end; from
SLOTS on the pinned ones, and as many places after that those that are left."""
(N_LAYERS, DEPTH, WIDTH, TURNS, PLANS, SHARES, N_KEYS, N_SLOTS, SLOT_OF, KEY_OF, STATE, PINS, TOLD, N_WORDS) = range(14)
"""Places of ``OpenPlans.words``: sizes and addresses, the last ones of a slot table's arrays."""
ENDED, NONE_OPEN = -1, -2
"""Results of ``end_plan`` that are not the slot that no plan has pinned."""


class OpenPlans:
    """The open plans of each layer of a slot table, a ring of ``depth`` places a layer; a plan pins at most as many
    slots as a layer has experts (``width``).

    ``turns`` int64[L, N_TURNS], ``plans`` int64[L, depth, SLOTS + 2 * width]. ``link_share`` float64[L, depth]: in
    which share of each plan's makespan the link works. Compiled code finds all that, and the table, by ``address``.
    """

    def __init__(self, slots: SlotTable) -> None:
        n_layers, width = slots.n_layers, slots.n_experts
        self._slots = slots
        self.turns = np.zeros((n_layers, N_TURNS), np.int64)
        self.plans = np.zeros((n_layers, FIRST_DEPTH, SLOTS + 2 * width), np.int64)
        self.link_share = np.zeros((n_layers, FIRST_DEPTH))
        self.words = np.zeros(N_WORDS, np.int64)
        self._open, self._end = open_plan, end_plan
        self.write_down()

    def write_down(self) -> None:
        """Sizes and addresses are those of the arrays as they are now: after a copy, or once the table was resized."""
        slots, words = self._slots, self.words
        words[[N_LAYERS, DEPTH, WIDTH]] = slots.n_layers, self.plans.shape[1], slots.n_experts
        words[[N_KEYS, N_SLOTS]] = slots.slot_of.size, slots.n_slots
        arrays: dict[int, npt.NDArray[np.int64] | npt.NDArray[np.float64]] = {
            TURNS: self.turns, PLANS: self.plans, SHARES: self.link_share, SLOT_OF: slots.slot_of,
            KEY_OF: slots.key_of, STATE: slots.state, PINS: slots.pins, TOLD: slots.told,
        }  # fmt: skip
        for place, array in arrays.items():
            words[place] = array.ctypes.data
        self.address = words.ctypes.data

    def make_room(self, layer: int) -> None:
        """Room for another plan of a layer."""
        depth = self.plans.shape[1]
        if self.turns[layer, COUNT] < depth:
            return
        for own, first in enumerate(self.turns[:, FIRST].tolist()):  # oldest first, so that a ring can go on
            self.plans[own] = np.roll(self.plans[own], -first, axis=0)
            self.link_share[own] = np.roll(self.link_share[own], -first)
        self.turns[:, FIRST] = 0
        self.plans = np.concatenate((self.plans, np.zeros_like(self.plans)), axis=1)
        self.link_share = np.concatenate((self.link_share, np.zeros_like(self.link_share)), axis=1)
        self.write_down()

    def open(self, layer: int, pinned: Ints, leaving: Ints, link_share: float) -> None:
        """A plan of a layer has pinned these slots, of which some are left at its end."""
        self.make_room(layer)
        self._open(self.address, layer, pinned, leaving, link_share)
        if self._open is open_plan:
            self._open = straight(open_plan)

    def end(self, layer: int) -> int:
        """See ``end_plan``."""
        ended = self._end(self.address, layer)
        if self._end is end_plan:
            self._end = straight(end_plan)
        return ended

    def oldest_link_share(self, layer: int) -> float:
        """Of a layer's oldest open plan."""
        return float(self.link_share[layer, self.turns[layer, FIRST]])


@compiled
def oldest_share(address: int, layer: int) -> float:
    """``OpenPlans.oldest_link_share``."""
    words = ints_at(address, N_WORDS)
    first = ints_at(words[TURNS], (words[N_LAYERS], N_TURNS))[layer, FIRST]
    return float(floats_at(words[SHARES], (words[N_LAYERS], words[DEPTH]))[layer, first])


@compiled
def has_room(address: int, layer: int) -> bool:
    """Whether another plan of a layer can be opened as the arrays are."""
    words = ints_at(address, N_WORDS)
    return bool(ints_at(words[TURNS], (words[N_LAYERS], N_TURNS))[layer, COUNT] < words[DEPTH])


@compiled
def _plans(words: Ints, layer: int) -> Ints:
    """A layer's row of ``OpenPlans.plans``."""
    size = SLOTS + 2 * words[WIDTH]
    return ints_at(words[PLANS] + 8 * size * words[DEPTH] * layer, (words[DEPTH], size))


@compiled
def open_plan(address: int, layer: int, pinned: Ints, leaving: Ints, link_share: float) -> None:
    """Adds a plan of a layer that there is room for: the slots that it has pinned, and those it leaves at its end."""
    words = ints_at(address, N_WORDS)
    turns = ints_at(words[TURNS], (words[N_LAYERS], N_TURNS))
    at = (turns[layer, FIRST] + turns[layer, COUNT]) % words[DEPTH]
    plan = _plans(words, layer)[at]
    turns[layer, COUNT] += 1
    floats_at(words[SHARES], (words[N_LAYERS], words[DEPTH]))[layer, at] = link_share
    plan[N_PINNED], plan[N_LEAVING] = pinned.size, leaving.size
    for i in range(pinned.size):
        plan[SLOTS + i] = pinned[i]
    for i in range(leaving.size):
        plan[SLOTS + words[WIDTH] + i] = leaving[i]


@compiled
def end_plan(address: int, layer: int) -> int:
    """Ends the oldest open plan of a layer: its slots are let go of. Returns ENDED, NONE_OPEN, or the first slot that
    no plan has pinned."""
    words = ints_at(address, N_WORDS)
    turns, n_slots = ints_at(words[TURNS], (words[N_LAYERS], N_TURNS)), words[N_SLOTS]
    if turns[layer, COUNT] == 0:
        return NONE_OPEN
    plan = _plans(words, layer)[turns[layer, FIRST]]
    state, pins, told = ints_at(words[STATE], n_slots), ints_at(words[PINS], n_slots), _told(words)
    turns[layer, FIRST] = (turns[layer, FIRST] + 1) % words[DEPTH]
    turns[layer, COUNT] -= 1
    for i in range(plan[N_PINNED]):
        if not unpin_slot(plan[SLOTS + i], state, pins, told):
            return int(plan[SLOTS + i])
    for i in range(plan[N_LEAVING]):
        slot = plan[SLOTS + words[WIDTH] + i]
        if state[slot] == RESIDENT and pins[slot] == 0:
            slot_of, key_of = ints_at(words[SLOT_OF], words[N_KEYS]), ints_at(words[KEY_OF], n_slots)
            free_slot(slot, slot_of, key_of, state, told)
    return ENDED


@compiled
def _told(words: Ints) -> Ints:
    """``SlotTable.told``."""
    return ints_at(words[TOLD], (STORY_EVENTS + 1, 3))
