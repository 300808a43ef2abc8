"""How many Python calls one layer call makes in the calling thread: what a decode step pays for beside its kernels."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from hybrimoe.bench.overhead import Contender, Request, SentContender
from scheduler import SlotTable

SHAPE = {"num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 4}
WARM_STEPS, STEPS = 24, 24
MOST_WITH_SLOTS, MOST_WITHOUT, MOST_SENT = 58, 13, 48
MOST_UNTIL_RELEASE, UNTIL_RELEASE = 22, "until the release"
"""Python calls a layer: compiled functions, torch's own module call and what moving experts takes included; of a layer
that a card has sent, also the clocks of what stands for the card. Until the release: what the card waits for."""
USUAL_MOVES, MOST_A_MOVE = 0.2, 40
"""Experts that move in a usual layer of these steps. How many do depends on the machine's pace; each further one may
take so many calls: a transfer to start, to follow and to report, and a piece of work of its own that waits for it."""


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
    layers, moved, until = (found.pop(name) for name in ("layer", "moved", UNTIL_RELEASE))
    per_layer = found.total() / layers
    listed = "\n".join(f"{n / layers:6.2f} {name}" for name, n in found.most_common(80))
    more = MOST_A_MOVE * max(moved / layers - USUAL_MOVES, 0.0)
    most += more
    assert per_layer <= most, f"{per_layer:.1f} calls a layer, with {moved / layers:.2f} experts moved:\n{listed}"
    if kind is SentContender:
        assert until / layers <= MOST_UNTIL_RELEASE + more, f"{until / layers:.1f} calls until the release:\n{listed}"
