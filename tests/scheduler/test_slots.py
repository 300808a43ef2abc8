"""The slot table: every legal path, every illegal one, and a random walk that keeps it consistent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import SlotError, SlotState, SlotTable


def test_life_of_a_slot() -> None:
    table = SlotTable(2, n_layers=2, n_experts=4)
    assert table.begin_transfer(0, key=5) == -1
    assert table.state_of(0) is SlotState.IN_FLIGHT
    assert table.occupant(0) == (1, 1)
    assert table.resident(1) == ()
    table.end_transfer(0, 5)
    assert table.state_of(0) is SlotState.RESIDENT
    assert table.resident(1) == (1,)
    assert table.slot(1, 1) == 0
    table.pin(0)
    assert table.state_of(0) is SlotState.PINNED
    table.unpin(0)
    assert table.begin_transfer(0, key=2) == 5
    assert table.slot(1, 1) == -1
    table.end_transfer(0, 2)
    assert table.free(0) == 2
    assert table.counts()[SlotState.FREE] == 2


def test_a_pin_set_in_flight_holds_after_landing() -> None:
    table = SlotTable(1, 1, 4)
    table.begin_transfer(0, 1)
    table.pin(0)
    table.end_transfer(0, 1)
    assert table.state_of(0) is SlotState.PINNED


def test_illegal_transitions_raise_and_change_nothing() -> None:
    table = SlotTable(2, 1, 4)
    table.begin_transfer(0, 1)
    for act, message in [
        (lambda: table.begin_transfer(0, 2), "in flight"),
        (lambda: table.begin_transfer(1, 1), "already in slot 0"),
        (lambda: table.end_transfer(0, 2), "no transfer of layer 0 expert 2"),
        (lambda: table.end_transfer(7, 2), "no transfer"),
        (lambda: table.pin(1), "free"),
        (lambda: table.unpin(0), "no plan uses it"),
        (lambda: table.free(0), "only an idle resident"),
        (lambda: table.hand_over(0, 2), "only a slot that a plan uses"),
    ]:
        with pytest.raises(SlotError, match=message):
            act()
    table.end_transfer(0, 1)
    table.pin(0)
    with pytest.raises(SlotError, match="pinned"):
        table.begin_transfer(0, 3)
    with pytest.raises(SlotError, match="pinned"):
        table.free(0)
    assert table.occupant(0) == (0, 1)


def test_a_slot_that_was_handed_over_expects_the_overtaken_transfer_to_end() -> None:
    table = SlotTable(1, 1, 4)
    table.begin_transfer(0, 1)
    table.pin(0)
    assert table.hand_over(0, 2) == 1
    table.pin(0)
    table.end_transfer(0, 1)
    assert table.state_of(0) is SlotState.IN_FLIGHT
    table.end_transfer(0, 2)
    table.unpin(0)
    table.unpin(0)
    assert table.state_of(0) is SlotState.RESIDENT
    assert table.occupant(0) == (0, 2)
    with pytest.raises(SlotError, match="no transfer"):
        table.end_transfer(0, 1)


def test_an_error_tells_what_happened_to_slot_and_expert_before() -> None:
    table = SlotTable(3, 2, 4, first_layer=10, first_slot=100)
    table.begin_transfer(0, 1)
    table.begin_transfer(1, 6)
    table.end_transfer(0, 1)
    table.pin_all(np.array([0, 1]))
    with pytest.raises(SlotError) as refused:
        table.begin_transfer(0, 2)
    assert str(refused.value) == (
        "slot 100 is pinned (layer 10 expert 1): only a free slot or a resident without a pin can be rewritten; latest"
        " events: begin_transfer layer 10 expert 1 slot 100; end_transfer layer 10 expert 1 slot 100; pin slot 100"
    )
    assert table.story(key=6) == ["begin_transfer layer 11 expert 2 slot 101"]


@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("state", 0, SlotState.PINNED, "cannot be with 0 pins"), ("state", 0, SlotState.FREE, "cannot be with"),
        ("pins", 0, 1, "cannot be with 1 pins"), ("state", 1, SlotState.RESIDENT, "cannot be with"),
        ("slot_of", 3, 0, "slots and experts disagree"), ("slot_of", 1, -1, "slots and experts disagree"),
    ],
)  # fmt: skip
def test_a_table_that_contradicts_itself_is_found(field: str, at: int, value: int, message: str) -> None:
    table = SlotTable(2, 1, 4)
    table.begin_transfer(0, 1)
    table.end_transfer(0, 1)
    table.validate()
    getattr(table, field)[at] = value
    with pytest.raises(SlotError, match=message):
        table.validate()


def test_sizes_are_cut_or_refused() -> None:
    assert SlotTable(99, 2, 4).n_slots == 8
    assert SlotTable(0, 2, 4).counts()[SlotState.FREE] == 0
    with pytest.raises(SlotError, match="n_slots >= 0"):
        SlotTable(-1, 2, 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 7)), max_size=60))
def test_random_walk_stays_consistent(actions: list[tuple[int, int, int]]) -> None:
    table = SlotTable(4, 2, 4)
    for action, slot, key in actions:
        method = ("begin_transfer", "end_transfer", "pin", "unpin", "free", "hand_over")[action]
        arguments = (slot,) if method in ("pin", "unpin", "free") else (slot, key)
        try:
            getattr(table, method)(*arguments)
        except SlotError:
            continue
    held = {int(k): s for s, k in enumerate(table.key_of) if k >= 0}
    assert len(held) == np.count_nonzero(table.key_of >= 0), "no expert twice"
    assert all(table.slot_of[k] == held.get(k, -1) for k in range(8))
    assert np.all((table.state == SlotState.FREE) == (table.key_of < 0))
    assert np.all(table.pins[table.state == SlotState.PINNED] > 0)
    assert np.all(table.pins[table.state == SlotState.RESIDENT] == 0)
