"""Recorded pieces on a real card: what they compute, when they share memory, and what a failed one leaves behind."""

from __future__ import annotations

import pytest
import torch

from gpu_kernels.errors import GraphError
from gpu_kernels.graphs import UNCACHED, Graph, TorchGraphs, graphs_of, records_graphs

on_a_card = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here"),
]


def test_none_on_the_host() -> None:
    assert graphs_of(torch.device("cpu")) is None


def test_none_where_torch_keeps_no_memory_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """compute-sanitizer's memcheck runs so: each tensor asks the driver, which ends a recording with an error."""
    device = torch.device("cuda", 0)
    monkeypatch.delenv(UNCACHED, raising=False)
    assert records_graphs(device)
    monkeypatch.setenv(UNCACHED, "1")
    assert not records_graphs(device)


def two_pieces(graphs: TorchGraphs, held: torch.Tensor) -> tuple[list[Graph], torch.Tensor, torch.Tensor]:
    """Pieces that double and then add one, with a number between them that is given from outside."""
    pieces: list[Graph] = []
    with graphs.recording():
        graphs.begin()
        doubled = held * 2
        pieces.append(graphs.end())
        given = torch.zeros_like(held)
        graphs.begin()
        out = doubled + given + 1
        pieces.append(graphs.end())
    return pieces, given, out


class TestOnACard:
    pytestmark = on_a_card

    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def test_pieces_run_when_they_are_replayed(self, device: torch.device) -> None:
        held = torch.zeros(1000, device=device)
        pieces, given, out = two_pieces(TorchGraphs(device), held)
        for number in (3.0, 5.0):
            held.fill_(number)
            pieces[0].replay()
            given.fill_(10.0)
            pieces[1].replay()
            assert torch.equal(out.cpu(), torch.full((1000,), 2 * number + 11))

    def test_recording_goes_on_after_all_graphs_were_freed(self, device: torch.device) -> None:
        graphs, held = TorchGraphs(device), torch.ones(10, device=device)
        for _ in range(3):
            pieces, _, out = two_pieces(graphs, held)
            for piece in pieces:
                piece.replay()
            assert torch.equal(out.cpu(), torch.full((10,), 3.0))
            del pieces, piece, out

    def test_work_that_cannot_be_recorded_leaves_the_device_and_its_random_numbers_usable(
        self, device: torch.device
    ) -> None:
        graphs, held = TorchGraphs(device), torch.ones(10, device=device)

        def record_a_wait_of_the_host() -> None:
            with graphs.recording():
                graphs.begin()
                assert float((held * 2).sum()) > 0
                graphs.end()

        with pytest.raises((GraphError, RuntimeError)):
            record_a_wait_of_the_host()
        torch.manual_seed(3)
        first = torch.rand(4, device=device).cpu()
        torch.manual_seed(3)
        assert torch.equal(torch.rand(4, device=device).cpu(), first)
        pieces, _, out = two_pieces(graphs, held)
        for piece in pieces:
            piece.replay()
        assert torch.equal(out.cpu(), torch.full((10,), 3.0))
