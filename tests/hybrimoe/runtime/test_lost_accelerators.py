"""Accelerators that hang or fail: the CPU goes on where it has everything, else a clear error; never a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cpu_kernels import relative_error
from gpu_kernels import EmulatedAccelerator, LostError
from gpu_kernels.waiting import LEAST_HOST_WAIT_S, LEAST_WAIT_S
from hybrimoe.config.deploy import load_config
from hybrimoe.config.runtime import runtime_config
from hybrimoe.errors import ConfigError
from scheduler.lossy import resolve_lossy
from tests.fake_device import DEVICE_TYPE, Cards, fake_cards

from .conftest import Rig, routing

MakeRig = Callable[..., Rig]
CARD = f"{DEVICE_TYPE}:0"
WAIT_S = 0.3
MOST_S = 20.0
"""A call whose accelerator hangs takes the wait, and what computing it takes on a busy machine."""
ALL_MOVE = "accel_only/none/lru"


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """What hangs waits for this, and ends after the test."""
    gate = threading.Event()
    yield gate
    gate.set()


def hang(monkeypatch: pytest.MonkeyPatch, lane: str, held: threading.Event) -> None:
    """From here on each copy, or each computation, of an emulated accelerator does not end."""
    if lane == "copy":
        monkeypatch.setattr(EmulatedAccelerator, "_transfer", lambda *_: held.wait())
    else:
        computed = EmulatedAccelerator.run_experts

        def run_experts(self: Any, *arguments: Any) -> Any:
            self._compute.submit(lambda event: held.wait(), computed.__globals__["HostEvent"]())
            return computed(self, *arguments)

        monkeypatch.setattr(EmulatedAccelerator, "run_experts", run_experts)


def check_right(rig: Rig, n_steps: int = 3) -> None:
    for step in range(n_steps):
        for layer in range(len(rig.layers)):
            call = routing(1, 8, 2, seed=500 + 3 * step + layer)
            assert relative_error(rig.call(layer, *call), rig.expected(layer, *call)) < 1e-5


def check_right_until_lost(rig: Rig) -> None:
    """Calls, until the policy moves or computes something on the accelerator that hangs."""
    for step in range(20):
        for layer in range(len(rig.layers)):
            call = routing(8, 8, 3, seed=step * 10 + layer)
            assert relative_error(rig.call(layer, *call), rig.expected(layer, *call)) < 1e-5
        if rig.session.lost:
            return


@pytest.mark.parametrize("lane", ["copy", "compute"])
@pytest.mark.parametrize("policy", [ALL_MOVE, "ours"])
def test_a_lane_that_hangs_leaves_the_call_to_the_cpu(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, held: threading.Event, lane: str, policy: str
) -> None:
    rig = make_rig(policy=policy, gpu_expert_slots=3, device_wait_s=WAIT_S)
    check_right(rig)
    hang(monkeypatch, lane, held)
    begun = time.monotonic()
    with pytest.warns(RuntimeWarning, match=r"emulated accelerator hangs: .* did not end within 0.3 s\. The CPU"):
        check_right_until_lost(rig)
    assert rig.session.lost is not None
    assert time.monotonic() - begun < MOST_S + WAIT_S
    check_right(rig)
    stats = rig.session.stats()
    assert (stats.accelerators, stats.failures, rig.session.n_slots) == ((), 1, 0)
    assert stats.as_dict()["lost"] == rig.session.lost
    begun = time.monotonic()
    rig.session.close()
    assert time.monotonic() - begun < MOST_S


def test_what_wakes_up_afterwards_changes_no_result(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    rig = make_rig(policy=ALL_MOVE, gpu_expert_slots=3, device_wait_s=WAIT_S)
    hang(monkeypatch, "compute", held)
    call = routing(8, 8, 3, seed=1)
    with pytest.warns(RuntimeWarning, match="hangs"):
        found = rig.call(0, *call)
    kept = found.clone()
    held.set()
    for seed in range(2, 8):
        check_right(rig, 1)
        assert relative_error(rig.call(0, *routing(8, 8, 3, seed)), rig.expected(0, *routing(8, 8, 3, seed))) < 1e-5
    assert torch.equal(found, kept)


def test_a_lossy_session_ends_with_what_to_do(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    rig = make_rig(policy=ALL_MOVE, gpu_expert_slots=3, device_wait_s=WAIT_S, lossy=resolve_lossy("skip"))
    hang(monkeypatch, "copy", held)
    for _ in range(2):
        with pytest.raises(LostError, match=r"hangs: .*scheduler\.lossy has experts.*accelerator none"):
            check_right_until_lost(rig)


def test_a_resize_of_what_hangs_is_an_error(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    rig = make_rig(policy=ALL_MOVE, gpu_expert_slots=3, device_wait_s=WAIT_S)
    hang(monkeypatch, "copy", held)
    rig.session.accelerators[0].copy_to_slot(0, rig.session.store.record(0, 0))
    with pytest.raises(LostError, match="hangs: all work of"):
        rig.session.resize_slots(4)
    with pytest.warns(RuntimeWarning, match="The CPU computes"):
        check_right(rig, 20)


# Real devices, on fake cards ----------------------------------------------------------------------------------------


def on_card(rig: Rig, n_tokens: int, seed: int) -> torch.Tensor:
    return rig.call(0, *(tensor.to(CARD) for tensor in routing(n_tokens, 8, 2, seed)))


def hang_streams(cards: Cards, rig: Rig, lane: str) -> None:
    copy = rig.session.accelerators[0]._copy_stream  # type: ignore[attr-defined]
    (copy if lane == "copy" else cards.stream(0)).hang()


def fail(cards: Cards, rig: Rig, how: str) -> None:
    cards.lose(0) if how == "lost" else hang_streams(cards, rig, how)


@pytest.mark.parametrize("how", ["copy", "compute", "lost"])
def test_a_card_takes_a_reply_of_a_model_on_the_host_not_along(make_rig: MakeRig, how: str) -> None:
    with fake_cards(1) as cards:
        rig = make_rig(accelerator=CARD, policy=ALL_MOVE, gpu_expert_slots=3, device_wait_s=WAIT_S)
        check_right(rig)
        fail(cards, rig, how)
        begun = time.monotonic()
        with pytest.warns(RuntimeWarning, match=r"fake card .*(hangs|has failed).*The CPU computes all experts"):
            check_right(rig)
        assert time.monotonic() - begun < MOST_S + WAIT_S
        check_right(rig)
        rig.session.close()


@pytest.mark.parametrize("how", ["copy", "compute", "lost"])
def test_a_card_with_the_model_on_it_ends_the_reply_with_what_to_do(make_rig: MakeRig, how: str) -> None:
    with fake_cards(1) as cards:
        rig = make_rig(accelerator=CARD, policy=ALL_MOVE, gpu_expert_slots=3, device_wait_s=WAIT_S)
        on_card(rig, 2, 0)
        given = [[tensor.to(CARD) for tensor in routing(8, 8, 3, seed)] for seed in range(4)]
        fail(cards, rig, how)
        for call in given:  # the first one waits; those behind it do not
            begun = time.monotonic()
            with pytest.raises(
                LostError, match=r"(hangs|has failed).*keys and values of the reply.*--accelerator none"
            ):
                rig.call(0, *call)
            assert time.monotonic() - begun < MOST_S + WAIT_S
        assert rig.session.lost is not None
        rig.session.close()


# How long ------------------------------------------------------------------------------------------------------------


def test_the_wait_is_far_longer_than_the_work_and_has_a_least(make_rig: MakeRig) -> None:
    def limit(**settings: Any) -> float:
        session = make_rig(**settings).session
        seconds = session.accelerators[0].wait_limit.seconds
        session.close()
        return seconds

    assert limit() == LEAST_HOST_WAIT_S
    with fake_cards(1):
        assert limit(accelerator=CARD) == LEAST_WAIT_S
    assert limit(device_wait_s=7.5) == 7.5
    rig = make_rig()
    planner = rig.session.planner
    assert planner is not None
    planner.cost_models[0].drift[1] = 1e7
    runner = rig.session._runner
    rig.session._start_runner(None, runner, None)
    assert rig.session.accelerators[0].wait_limit.seconds > 2 * LEAST_HOST_WAIT_S


@pytest.mark.parametrize(("given", "seconds"), [("auto", None), (12, 12.0), (0.5, 0.5), ("none", float("inf"))])
def test_the_wait_can_be_set(given: Any, seconds: float | None) -> None:
    assert runtime_config(load_config({"device_wait_seconds": given, "accelerator": "none"})).device_wait_s == seconds


@pytest.mark.parametrize("given", [0, -1, "soon", float("inf")])
def test_a_wait_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="device_wait_seconds"):
        load_config({"device_wait_seconds": given})
