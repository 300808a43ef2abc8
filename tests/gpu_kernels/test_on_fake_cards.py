"""TorchAccelerator on fake cards: the order of streams, what the host waits for, several cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from cpu_kernels import get_backend, relative_error, tolerance
from gpu_kernels import TorchAccelerator, open_accelerator
from tests.fake_device import DEVICE_TYPE, Cards, fake_cards

from .conftest import Experts


@pytest.fixture
def cards() -> Iterator[Cards]:
    with fake_cards(2) as found:
        yield found


def run_call(accelerator: TorchAccelerator, experts: Experts, n_tokens: int = 7) -> torch.Tensor:
    """Every second expert on the card, the others on the host; the call's output."""
    accelerator.allocate(3, experts.spec.record_bytes)
    work = experts.work(n_tokens, 3, absent=True)
    work.hidden = work.hidden.to(accelerator.device)
    ids = work.dispatch.expert_ids.tolist()
    on_card, on_host = list(range(0, len(ids), 2)), np.arange(1, len(ids), 2, dtype=np.int32)
    for slot, position in enumerate(on_card):
        accelerator.copy_to_slot(slot, experts.records[ids[position]])
    event = accelerator.run_experts(experts.spec, range(len(on_card)), on_card, work)
    addresses = np.array([experts.records[ids[p]].ctypes.data for p in on_host], np.uint64)
    get_backend("reference").run(experts.spec, addresses, on_host, work.dispatch, work.host_hidden, work.host_rows)
    work.host_positions = on_host
    out = accelerator.combine(work, [event])
    assert out.device == accelerator.device
    assert relative_error(out.cpu(), experts.expected(work)) <= tolerance(experts.spec)
    return out


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("n_tokens", [1, 7, 60])
def test_a_call_is_right_on_every_card(
    cards: Cards, make_experts: Callable[..., Experts], index: int, dtype: str, n_tokens: int
) -> None:
    accelerator = TorchAccelerator(torch.device(DEVICE_TYPE, index))
    run_call(accelerator, make_experts(dtype, bias=True), n_tokens)
    accelerator.close()
