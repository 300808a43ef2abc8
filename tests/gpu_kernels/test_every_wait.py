"""Every wait of the code for a device is needed, and the fake device sees when it is not made.

The sites are found in the code (`tests/fake_device/mutants.py`); for each of them some scenario must fail without it,
or NOT_SEEN says why none can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from gpu_kernels import LostError, TorchAccelerator
from gpu_kernels.downloads import Downloads
from gpu_kernels.driver import functions
from gpu_kernels.waiting import new_limit
from hybrimoe.runtime import RuntimeConfig, Session
from scheduler import HardwareProfile
from scheduler.machine.profile import AccelProfile, CpuProfile, LinkProfile
from tests.fake_device import DEVICE_TYPE, ManualClock, fake_cards
from tests.fake_device.driver import FakeDriver
from tests.fake_device.fused import StreamedKernels
from tests.fake_device.graphs import CardGraphs
from tests.fake_device.mutants import Site, sites, without
from tests.gpu_kernels.hangs import HANGS
from tests.hybrimoe.runtime.conftest import HIDDEN, MiniExperts

CARD = f"{DEVICE_TYPE}:0"
N_LAYERS, N_EXPERTS, TOP_K = 3, 16, 3
SLOW, FAST = 1e-2, 8.0
COSTS = HardwareProfile(
    name="test", provenance="datasheet",
    cpu=CpuProfile(read_gbps=0.5, gflops=dict.fromkeys(("float32", "bfloat16", "int8", "int4"), 20.0)),
    accel=AccelProfile(mem_gbps=100.0, tflops=1.0, launch_us=1.0), link=LinkProfile(gbps=1000.0, latency_us=0.0),
)  # fmt: skip
NOT_SEEN = {
    "gpu_kernels.graphs:TorchGraphs.recording": "recorded by CUDA's own graphs, which are not modelled",
    "gpu_kernels.graphs:TorchGraphs.time_us": "recorded by CUDA's own graphs, which are not modelled",
    "gpu_kernels.torch_events:TimeOrigin._renew": "the stream is always idle: without the wait the host's time of the"
    " origin is that of its submission, some microseconds before",
}
"""By function: why no scenario can fail without the wait."""


@contextmanager
def started(**settings: Any) -> Iterator[Callable[[int, int], torch.Tensor]]:
    """A session on a card; what it gives computes a layer for so many tokens, as the host does it."""
    given = {
        "accelerator": CARD, "gpu_expert_slots": 20, "expert_dtype": "float32", "profile": COSTS, "backend": "torch",
        "policy": "ours",
    }  # fmt: skip
    session = Session(RuntimeConfig(**given | settings))
    host = Session(RuntimeConfig("none", 0, "float32", backend="torch"))
    layers = [
        [one.add_layer(f"layers.{i}.experts", MiniExperts(N_EXPERTS, i)) for i in range(N_LAYERS)]
        for one in (session, host)
    ]
    for one in (session, host):
        one.finalize()

    def call(layer: int, n_tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(layer + n_tokens)
        hidden = torch.randn(n_tokens, HIDDEN, generator=generator)
        weights, ids = torch.rand(n_tokens, N_EXPERTS, generator=generator).topk(TOP_K, dim=-1)
        with torch.no_grad():
            found = layers[0][layer](hidden.to(CARD), ids.to(CARD), weights.to(CARD)).cpu()
            torch.testing.assert_close(found, layers[1][layer](hidden, ids, weights), rtol=1e-4, atol=1e-4)
        return found

    try:
        yield call
    finally:
        session.close()
        host.close()


def steps(link_gbps: float = FAST, sizes: tuple[int, ...] = (60, 60, 1, 1, 60, 1), **settings: Any) -> None:
    """Prompts and tokens in turn."""
    with fake_cards(1, link_gbps=link_gbps, refuses_locking=settings.pop("pageable", False)) as cards:
        with started(**settings) as call:
            for n_tokens in sizes:
                for layer in range(N_LAYERS):
                    call(layer, n_tokens)
        cards.check()


def planned_prompts_and_tokens() -> None:
    """By a policy that has everything copied on demand."""
    steps(SLOW, policy="on_demand/none/lru", gpu_expert_slots=8)


def streamed_prompts() -> None:
    """Through the halves of the slots."""
    steps(SLOW)
    steps(FAST)


def pageable_memory() -> None:
    """Records go through staging buffers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # which says so
        steps(SLOW, policy="on_demand/none/lru", gpu_expert_slots=8, pageable=True)


def slots_that_are_handed_to_compiled_code() -> None:
    """Behind experts that read them, on the current stream or on another."""
    for own_stream in (False, True):
        with fake_cards(1) as cards:
            accelerator = TorchAccelerator(CARD)
            accelerator.allocate(2, 512)
            record = torch.empty(512, dtype=torch.uint8, pin_memory=True)
            record.fill_(3)
            accelerator.copy_to_slot(0, record.numpy()).wait()
            current, other = cards.stream(), torch.Stream(torch.device(CARD))
            for reading, noted in ((other if own_stream else current, own_stream), (other, False)):
                with reading:
                    held = accelerator._slots[0].clone()
                    end = accelerator._device_event()
                    end.start.record(reading)
                    end.end.record(reading)
                    if noted:
                        accelerator._read_by = reading
                    else:
                        accelerator._events.on_read([0], end)
                queue = accelerator.driver_queue(FakeDriver(cards))
                accelerator.hand_to(queue)
                copies = accelerator._copy_stream
                assert copies is not None
                with copies:
                    accelerator._slots[0].copy_(record, non_blocking=True)
                accelerator.synchronize()
                del held
            cards.check()


def tensors_that_a_card_sends() -> None:
    """Read by the host once they are there."""
    with fake_cards(1, clock=ManualClock()) as cards:
        given = torch.arange(8.0).to(CARD) * 2
        (found,) = Downloads(torch.device(CARD)).fetch(given)
        assert torch.equal(found, torch.arange(8.0) * 2)
        cards.check()


def a_piece_that_sends_its_call() -> None:
    """As `Exchange`."""
    with fake_cards(1, clock=ManualClock()) as cards:
        accelerator = TorchAccelerator(CARD)
        exchange = accelerator.exchange(1, 2, 8, torch.float32, torch.float32)
        hidden, ids = torch.ones(1, 8).to(CARD) * 3, torch.tensor([[4, 5]]).to(CARD) + 1
        exchange.send(hidden, ids, torch.ones(1, 2).to(CARD))
        exchange.wait()
        assert exchange.ids.tolist() == [[5, 6]]
        assert (exchange.hidden == 3.0).all()
        cards.check()


def a_driver_that_is_tried_out() -> None:
    """Its copy takes long."""
    with fake_cards(1, clock=ManualClock(), link_gbps=1e-4) as cards:
        functions.try_out(FakeDriver(cards), cards.device(0), CardGraphs(cards))
        cards.check()


def a_copy_of_compiled_code_that_is_read_back() -> None:
    """By Python, after it has waited."""
    with fake_cards(1, clock=ManualClock(), link_gbps=1e-4) as cards:
        accelerator = TorchAccelerator(CARD)
        accelerator.allocate(2, 512)
        record = torch.empty(512, dtype=torch.uint8, pin_memory=True)
        record.fill_(3)
        queue = accelerator.driver_queue(FakeDriver(cards))
        accelerator.hand_to(queue)
        accelerator.copy_to_slot(1, record.numpy())
        queue.take_over(0, 1)
        accelerator.take_from(queue, {})
        accelerator._events.on_write(1, accelerator.queued_copy(queue, 0))
        assert (accelerator.read_slot(1, 512) == 3).all()
        cards.check()


def a_slot_that_is_read_back() -> None:
    """Its copy takes long."""
    with fake_cards(1, clock=ManualClock(), link_gbps=1e-4) as cards:
        accelerator = TorchAccelerator(CARD)
        accelerator.allocate(1, 512)
        record = torch.empty(512, dtype=torch.uint8, pin_memory=True)
        record.fill_(7)
        accelerator.copy_to_slot(0, record.numpy())
        assert np.array_equal(accelerator.read_slot(0, 512), record.numpy())
        cards.check()


def a_card_that_hangs_before_it_is_read() -> None:
    """The host gives up."""
    with fake_cards(1) as cards:
        accelerator = TorchAccelerator(CARD)
        accelerator.allocate(1, 512)
        record = torch.empty(512, dtype=torch.uint8, pin_memory=True)
        accelerator.copy_to_slot(0, record.numpy()).wait()
        accelerator.wait_limit.allow(0.05)
        cards.stream().hang()
        try:
            with pytest.raises(LostError):
                accelerator.read_slot(0, 512)
        finally:
            cards.findings.clear()
            new_limit(accelerator.device, "a card that works")  # of the device's other users


def recorded_experts_behind_their_copies() -> None:
    """A launch reads slots that are being filled; a later copy writes over what it reads."""
    with fake_cards(1, clock=ManualClock(), link_gbps=1e-3) as cards:
        accelerator = TorchAccelerator(CARD)
        accelerator.allocate(2, 512)
        record = torch.empty(512, dtype=torch.uint8, pin_memory=True)
        record.fill_(5)
        for _ in range(2):
            accelerator.copy_to_slot(0, record.numpy())
            accelerator.launch(lambda: cards_read(accelerator, 0), [0])
        accelerator.synchronize()
        cards.check()


def cards_read(accelerator: TorchAccelerator, slot: int) -> None:
    """Work on the current stream that reads a slot."""
    accelerator._slots[slot].clone()


SCENARIOS: tuple[Callable[[], None], ...] = (
    *HANGS, tensors_that_a_card_sends, a_piece_that_sends_its_call, a_driver_that_is_tried_out,
    a_slot_that_is_read_back, a_copy_of_compiled_code_that_is_read_back, a_card_that_hangs_before_it_is_read,
    recorded_experts_behind_their_copies, slots_that_are_handed_to_compiled_code, planned_prompts_and_tokens,
    streamed_prompts, pageable_memory,
)  # fmt: skip


@pytest.fixture(autouse=True)
def any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamedKernels, "MAX_TOKENS", 1 << 20)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_scenario_passes_with_all_waits(scenario: Callable[[], None]) -> None:
    scenario()


def failure(scenario: Callable[[], None]) -> str | None:
    """What a scenario fails with; None where it passes."""
    try:
        scenario()
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - whatever it is: the wait is missed
        return f"{scenario.__name__}: {type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("site", sites(), ids=str)
def test_without_a_wait_something_fails(site: Site) -> None:
    with without(site):
        seen = next(filter(None, map(failure, SCENARIOS)), None)
    reason = NOT_SEEN.get(f"{site.module}:{site.function}")
    assert (seen is None) == (reason is not None), f"{site}: seen by {seen}, and NOT_SEEN says {reason}"


def test_the_table_names_sites_that_exist() -> None:
    assert set(NOT_SEEN) <= {f"{site.module}:{site.function}" for site in sites()}
    assert len(sites()) >= 45, "nothing was found"
