"""What host and device hand each other at a layer: the sum of both parts, and the order of copies and recorded work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch

from cpu_kernels import get_backend, relative_error, tolerance
from gpu_kernels import LayerWork, SlotError, TorchAccelerator
from gpu_kernels.errors import GraphError
from gpu_kernels.exchange import Exchange
from tests.fake_device import DEVICE_TYPE, ManualClock, fake_cards
from tests.fake_device.streams import FakeStream

from .conftest import Experts

CARD, HOST = f"{DEVICE_TYPE}:0", "cpu"
SLOW_LINK_GBPS = 1e-3


@pytest.fixture(params=[HOST, CARD])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    cards: AbstractContextManager[object] = fake_cards(1) if request.param == CARD else nullcontext()
    with cards:
        yield request.param


class Call:
    """A call of `n_tokens` tokens: every second active expert in a slot, the others on the CPU."""

    def __init__(self, experts: Experts, device: str, n_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        self.experts = experts
        self.accelerator = TorchAccelerator(device)
        self.accelerator.allocate(3, experts.spec.record_bytes)
        self.work = work = experts.work(n_tokens, 3, absent=True)
        self.hidden = work.hidden.to(dtype).to(device)
        dispatch = work.dispatch
        self.weights = torch.from_numpy(dispatch.weights.reshape(n_tokens, 3)).to(device)
        ids = torch.full((n_tokens * 3,), -1)
        for position, expert in enumerate(dispatch.expert_ids.tolist()):
            ids[dispatch.rows[dispatch.offsets[position] : dispatch.offsets[position + 1]]] = expert
        self.ids = ids.view(n_tokens, 3).to(device)
        self.exchange = self.accelerator.exchange(n_tokens, 3, experts.spec.hidden, dtype, torch.float32)

    def send(self) -> None:
        self.exchange.send(self.hidden, self.ids, self.weights)
        self.exchange.wait()

    def split(self) -> None:
        """The host's part, with the places of all pairs."""
        work, dispatch, exchange, spec = self.work, self.work.dispatch, self.exchange, self.experts.spec
        self.records: list[np.ndarray] = []
        exchange.put_nothing()
        exchange.slots[:] = -1
        on_host = []
        for position, expert in enumerate(dispatch.expert_ids.tolist()):
            rows = dispatch.rows[dispatch.offsets[position] : dispatch.offsets[position + 1]]
            if position % 2:
                on_host.append(position)
                exchange.source[rows] = rows
                continue
            self.accelerator.copy_to_slot(position // 2, self.experts.records[expert])
            exchange.source[rows], exchange.slots[rows] = -1, position // 2
        positions = np.array(on_host, np.int32)
        addresses = np.array([self.experts.records[dispatch.expert_ids[p]].ctypes.data for p in on_host], np.uint64)
        host_hidden = exchange.hidden.float().numpy()
        get_backend("reference").run(spec, addresses, positions, dispatch, host_hidden, exchange.rows)
        slots = sorted({int(slot) for slot in exchange.slots if slot >= 0})
        self.accelerator.launch(self.compute, slots)
        assert np.array_equal(exchange.ids.flatten().numpy() >= 0, exchange.source < exchange.source.size)
        assert work.dispatch.n_tokens == len(exchange.hidden)

    def compute(self) -> None:
        self.accelerator.compute_exchanged(self.experts.spec, self.exchange, self.hidden, self.weights)

    def combined(self) -> torch.Tensor:
        return self.accelerator.combine_exchanged(self.exchange).cpu()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("n_tokens", [1, 4])
def test_both_parts_are_added(make_experts: Callable[..., Experts], device: str, dtype: str, n_tokens: int) -> None:
    call = Call(make_experts(dtype, bias=True), device, n_tokens)
    for _ in range(3):  # in the first turn kernels are compared with torch
        call.send()
        call.split()
        found = call.combined()
        assert relative_error(found, call.experts.expected(call.work)) <= tolerance(call.experts.spec)
    call.accelerator.close()


def test_the_output_has_the_models_dtype(make_experts: Callable[..., Experts], device: str) -> None:
    call = Call(make_experts("bfloat16"), device, 2, torch.bfloat16)
    call.send()
    call.split()
    found = call.combined()
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), call.experts.expected(call.work)) < 2e-2


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_whole_output_in_place_of_rows(make_experts: Callable[..., Experts], device: str, where: str) -> None:
    call = Call(make_experts(), device, 3)
    output = torch.randn(3, call.experts.spec.hidden)
    for given in (output, output + 1.0):
        call.send()
        call.exchange.put(given.to(device) if where == "device" else given)
        assert torch.equal(call.combined(), given)
    call.exchange.put_nothing()
    assert not call.combined().any()


def reused(experts: Experts, cards_of: Callable[[], AbstractContextManager[object]]) -> list[str]:
    """Findings of a slot that recorded work reads and a later copy rewrites, with nothing waited for between."""
    with cards_of() as cards:
        call = Call(experts, CARD, 1)
        call.send()
        call.split()
        call.accelerator.copy_to_slot(0, experts.records[5])
        call.accelerator.synchronize()
        findings = list(cards.findings)  # type: ignore[attr-defined]
        cards.findings.clear()  # type: ignore[attr-defined]
    return findings


def test_copies_begin_after_the_recorded_work_before_them(
    make_experts: Callable[..., Experts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow() -> AbstractContextManager[object]:
        return fake_cards(1, clock=ManualClock(), link_gbps=SLOW_LINK_GBPS)

    assert reused(make_experts(), slow) == []
    monkeypatch.setattr(FakeStream, "wait_stream", lambda self, other: None)
    assert any("writes over what may still be read" in finding for finding in reused(make_experts(), slow))


def test_recorded_work_awaits_slots_that_were_filled(make_experts: Callable[..., Experts]) -> None:
    with fake_cards(1):
        call = Call(make_experts(), CARD, 1)
        for slot in (2, 3):
            with pytest.raises(SlotError, match=r"never filled|does not exist"):
                call.accelerator.launch(lambda: None, [slot])


def test_timed_work_has_a_span(make_experts: Callable[..., Experts], device: str) -> None:
    call = Call(make_experts(), device, 1)
    call.send()
    call.split()
    assert call.accelerator.launch(call.compute, []) is None
    end = call.accelerator.launch(call.compute, [], timed=True)
    assert end is not None
    end.wait()
    start_us, end_us = end.span_us
    assert end_us > start_us > 0


def test_a_host_that_locks_no_memory_has_no_exchange() -> None:
    with (
        fake_cards(1, refuses_locking=True),
        pytest.warns(RuntimeWarning, match="page-locked"),
        pytest.raises(GraphError, match="page-locked"),
    ):
        Exchange(torch.device(CARD), 1, 2, 64, torch.float32, torch.float32)


def test_a_call_shares_no_memory_with_the_next(make_experts: Callable[..., Experts], device: str) -> None:
    """Outputs stay what they are while the exchange carries on."""
    call = Call(make_experts(), device, 1)
    call.send()
    call.exchange.put(torch.ones(1, call.experts.spec.hidden))
    first = call.accelerator.combine_exchanged(call.exchange)
    call.send()
    call.exchange.put(torch.zeros(1, call.experts.spec.hidden))
    second = call.accelerator.combine_exchanged(call.exchange)
    assert bool((first == 1).all())
    assert not second.any()
    assert isinstance(call.work, LayerWork)
