"""How many Python calls one layer call makes in the calling thread: what a decode step pays for beside its kernels."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from gpu_kernels import emulated, streams
from gpu_kernels.streams import HostEvent, HostStream, Job
from hybrimoe.bench.overhead import CARD, Contender, Request, SentContender
from hybrimoe.machine.profiles import open_hardware
from hybrimoe.runtime.layer_call import lanes
from scheduler import HardwareProfile, SlotTable

SHAPE = {"num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 4}
WARM_STEPS, STEPS = 24, 24
MOST_WITH_SLOTS, MOST_WITHOUT, MOST_SENT = 46, 13, 41
MOST_UNTIL_RELEASE, UNTIL_RELEASE = 20, "until the release"
"""Python calls a layer: compiled functions, torch's own module call and what moving experts takes included; of a layer
that a card has sent, also the clocks of what stands for the card. Until the release: what the card waits for."""
USUAL_MOVES, MOST_A_MOVE = 0.2, 30
"""Experts that move in a usual layer of these steps. How many do depends on the machine's pace; each further one may
take so many calls: a transfer to start, to follow and to report, and a piece of work of its own that waits for it."""
MOST_AT_ANY_PACE = 57
"""With slots, where the number of experts that move does not depend on the machine, moves included."""
CPU_GBPS = 1.0
"""At which experts of the test's size are worth moving."""
TICK_US, MOST_LATE = 50.0, 3
"""By how much a clock of the tests' own goes on each time it is read; copies that are late at a time."""


def perform(items: Sequence[tuple[Job, HostEvent]]) -> None:
    """Runs jobs, which are not counted: what the test does in place of a thread."""
    counting = sys.getprofile()
    sys.setprofile(None)
    for job, event in items:
        try:
            job(event)
        except Exception as error:  # noqa: BLE001 - whoever waits for the event is told
            event.finish(error)
        else:
            event.finish()
    sys.setprofile(counting)


class AtOnceStream(HostStream):
    """Jobs end before their submission returns: nobody ever waits."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.put = self._perform

    def _perform(self, item: tuple[Job, HostEvent]) -> None:
        perform([item])


class LateStream(HostStream):
    """Jobs start when somebody waits for them or for a later one, so that each wait blocks. Copies, which nobody may
    ever wait for, start at the latest when MOST_LATE others have come."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self._late: list[tuple[Job, HostEvent]] = []
        self._at_work, self._over = threading.Lock(), False
        self.put = self._postpone
        self._worker = threading.Thread(target=self._serve, daemon=True)
        self._worker.start()

    def _postpone(self, item: tuple[Job, HostEvent]) -> None:
        self._late.append(item)
        if "copy" in self.name:
            self._perform_all_but(MOST_LATE)

    def _perform_all_but(self, n: int) -> None:
        with self._at_work:
            perform(self._late[: max(len(self._late) - n, 0)])
            del self._late[: max(len(self._late) - n, 0)]

    def _serve(self) -> None:
        while not self._over:
            late = list(self._late)
            awaited = [at for at, (_, event) in enumerate(late) if event.__dict__.get("_gates")]
            if awaited:
                self._perform_all_but(len(late) - 1 - awaited[-1])
            else:
                time.sleep(1e-4)

    def close(self) -> None:
        self._perform_all_but(0)
        self._over = True
        super().close()


class PacedContender(Contender):
    """The costs are a card's, beside a CPU that is so slow that experts move; not what this machine takes."""

    @staticmethod
    def _profile() -> HardwareProfile | None:
        known = open_hardware(CARD)
        return replace(known, cpu=replace(known.cpu, read_gbps=CPU_GBPS))


def calls_of_a_layer(shape: str, policy: str | None, kind: type[Contender]) -> Counter[str]:
    """Calls of the decode steps after the warm-up; "layer" and "moved" count layer calls and experts that moved, "until
    the release" the calls before what a sent call leaves to do."""
    request = Request(shape, 4, (policy or "ours",), "float32", 0.25, STEPS, 1)
    contender = kind(request, policy)  # type: ignore[arg-type]
    found: Counter[str] = Counter()
    released: list[str] = []

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            name = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
            found[name] += 1
            if name == "session.py:settle":
                released.append(name)
            if not released:
                found[UNTIL_RELEASE] += 1

    try:
        steps = contender.calls(WARM_STEPS + STEPS)
        contender.run(steps[:WARM_STEPS])
        contender.session.reset_stats()
        with torch.no_grad():
            for step in steps[WARM_STEPS:]:
                for layer, call in enumerate(step):
                    run = contender.prepared(layer, call)
                    sys.setprofile(note)
                    run()
                    sys.setprofile(None)
                    released.clear()
                    found["layer"] += 1
        total = contender.session.stats().total
        found["moved"] = total.transfers + total.prefetches
    finally:
        sys.setprofile(None)
        contender.session.close()
    return found


@pytest.mark.parametrize(
    ("policy", "most", "kind"),
    [("ours", MOST_WITH_SLOTS, Contender), (None, MOST_WITHOUT, Contender), ("ours", MOST_SENT, SentContender)],
)
def test_a_layer_call_stays_within_its_budget(
    small_shape: Callable[..., str],
    policy: str | None,
    most: float,
    kind: type[Contender],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SlotTable, "validating", False)
    found = calls_of_a_layer(small_shape(**SHAPE), policy, kind)
    until = found.pop(UNTIL_RELEASE)
    layers, moved, listed = _compared(found, most)
    more = MOST_A_MOVE * max(moved / layers - USUAL_MOVES, 0.0)
    if kind is SentContender:
        assert until / layers <= MOST_UNTIL_RELEASE + more, f"{until / layers:.1f} calls until the release:\n{listed}"


@pytest.mark.parametrize("stream", [AtOnceStream, LateStream])
def test_the_budget_holds_at_any_pace_of_the_accelerator(
    small_shape: Callable[..., str], stream: type[HostStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(1)
    monkeypatch.setattr(SlotTable, "validating", False)
    monkeypatch.setattr(emulated, "HostStream", stream)
    monkeypatch.setattr(streams, "clock_us", lambda: next(ticks) * TICK_US)
    monkeypatch.setattr(lanes, "perf_counter_ns", lambda: int(next(ticks) * TICK_US * 1e3))
    found = calls_of_a_layer(small_shape(**SHAPE), "ours", PacedContender)
    found.pop(UNTIL_RELEASE)
    for name in [name for name in found if name.startswith(Path(__file__).name)]:
        del found[name]
    layers, moved, listed = _compared(found, MOST_WITH_SLOTS)
    assert moved, "nothing moved: not what is to be counted"
    assert found.total() / layers <= MOST_AT_ANY_PACE, listed


def _compared(found: Counter[str], most: float) -> tuple[int, int, str]:
    """Compares the calls that were counted with a budget of a layer. Returns the numbers of layers and of experts that
    moved, and what was called."""
    layers, moved = found.pop("layer"), found.pop("moved")
    listed = "\n".join(f"{n / layers:6.2f} {name}" for name, n in found.most_common(80))
    most += MOST_A_MOVE * max(moved / layers - USUAL_MOVES, 0.0)
    per_layer = found.total() / layers
    assert per_layer <= most, f"{per_layer:.1f} calls a layer, with {moved / layers:.2f} experts moved:\n{listed}"
    return layers, moved, listed
