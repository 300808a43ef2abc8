"""Routing prediction: right for the layer it is made for, silent where it cannot be, and without side effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hybrimoe.runtime import RuntimeConfig, Session
from hybrimoe.runtime.layer_call.lookahead import LinearGate, ProbedGate

from .conftest import HIDDEN, PROFILE, MiniExperts

N_EXPERTS, TOP_K = 16, 3


class LinearRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N_EXPERTS, HIDDEN))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, index = torch.softmax(x @ self.weight.T, -1).topk(TOP_K)
        return weights, index


class SaturatedRouter(LinearRouter):
    """Logits so far apart that most probabilities are exactly 0: only the logits still have an order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N_EXPERTS, HIDDEN) * 40)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, index = (x @ self.weight.T).topk(TOP_K)
        return torch.softmax(logits, -1), index


class CorrectedSigmoidRouter(LinearRouter):
    def __init__(self) -> None:
        super().__init__()
        self.e_score_correction_bias = nn.Buffer(torch.randn(N_EXPERTS) * 0.3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.sigmoid(x @ self.weight.T)
        index = (scores + self.e_score_correction_bias).topk(TOP_K).indices
        return scores.gather(-1, index), index


class TwoLayerRouter(nn.Module):
    """No single matrix reproduces it, so it has to be probed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, 24), nn.Linear(24, N_EXPERTS)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, index = torch.softmax(self.second(torch.tanh(self.first(x)) * 9), -1).topk(TOP_K)
        return weights, index


class Block(nn.Module):
    def __init__(self, router: Callable[[], nn.Module], seed: int) -> None:
        super().__init__()
        self.gate, self.experts = router(), MiniExperts(N_EXPERTS, seed)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        flat = x.view(-1, HIDDEN)
        weights, index = self.gate(flat)
        return self.experts(flat, index, weights).view(x.shape)


class HashBlock(Block):
    """Routes by something that the hidden state does not tell."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        if ids is None:
            raise ValueError("token ids are needed")
        flat = x.view(-1, HIDDEN)
        index = (ids.view(-1, 1) * 7 + torch.arange(TOP_K)) % N_EXPERTS
        return self.experts(flat, index, torch.full(index.shape, 0.3)).view(x.shape)


def build(blocks: list[Block], **settings: Any) -> tuple[nn.Module, Session]:
    model = nn.Module()
    model.layers = nn.ModuleList(blocks)
    config = {"gpu_expert_slots": 8, "profile": PROFILE, "backend": "torch", "policy": "hybrimoe"} | settings
    session = Session(RuntimeConfig("emulated", **config))
    for i, block in enumerate(blocks):
        block.experts = session.add_layer(f"layers.{i}.experts", block.experts)  # type: ignore[assignment]
    session.finalize(model)
    return model, session


def predictions_of(session: Session, block: Block, x: torch.Tensor) -> tuple:
    seen: list[tuple] = []
    session.routing_recorder = lambda layer, ids, weights, predictions: seen.append(predictions)
    with torch.no_grad():
        block(x)
    session.routing_recorder = None
    return seen[-1]


@pytest.mark.parametrize("router", [LinearRouter, SaturatedRouter, CorrectedSigmoidRouter, TwoLayerRouter])
@pytest.mark.parametrize("n_tokens", [1, 7])
def test_predictions_are_what_the_next_routers_give(router: Callable[[], nn.Module], n_tokens: int) -> None:
    torch.manual_seed(3)
    blocks = [Block(router, i) for i in range(5)]
    _, session = build(blocks)
    for block in blocks:
        predictions_of(session, block, torch.randn(1, 12, HIDDEN))
    with torch.no_grad():
        x = torch.randn(1, n_tokens, HIDDEN)
        found = predictions_of(session, blocks[1], x)
        assert [p.layer for p in found] == [2, 3, 4]
        for prediction in found:
            _, index = blocks[prediction.layer].gate(x.view(-1, HIDDEN))
            counts = np.bincount(index.reshape(-1), minlength=N_EXPERTS)
            assert prediction.expert_ids.tolist() == np.flatnonzero(counts).tolist()
            assert prediction.n_tokens.tolist() == counts[prediction.expert_ids].tolist()
            assert ((prediction.scores >= 0) & (prediction.scores <= 1)).all()
    session.close()


def test_the_cheap_way_is_found_and_the_general_one_used_where_it_is_not() -> None:
    torch.manual_seed(4)
    blocks = [Block(LinearRouter, 0), Block(TwoLayerRouter, 1), Block(CorrectedSigmoidRouter, 2)]
    _, session = build(blocks)
    with torch.no_grad():
        for block in blocks:
            block(torch.randn(1, 16, HIDDEN))
    lookahead = session._runner.lookahead  # type: ignore[union-attr]
    assert lookahead is not None
    kinds = [type(lookahead.gate(i)) for i in range(3)]
    assert kinds == [LinearGate, ProbedGate, LinearGate]
    gate = lookahead.gate(2)
    assert isinstance(gate, LinearGate)
    assert gate.scoring == "sigmoid"
    session.close()


def test_a_block_that_cannot_be_predicted_is_left_out() -> None:
    blocks = [Block(LinearRouter, 0), HashBlock(LinearRouter, 1), Block(LinearRouter, 2)]
    _, session = build(blocks)
    ids = torch.arange(6)
    with torch.no_grad():
        for _ in range(2):
            blocks[0](torch.randn(1, 6, HIDDEN))
            blocks[1](torch.randn(1, 6, HIDDEN), ids)
            blocks[2](torch.randn(1, 6, HIDDEN))
    assert [p.layer for p in predictions_of(session, blocks[0], torch.randn(1, 6, HIDDEN))] == [2]
    session.close()


def test_probing_leaves_the_model_as_it_was() -> None:
    """Probed blocks compute no experts, and calls in a fresh context keep transformers' output recorders blind."""
    torch.manual_seed(5)
    blocks = [Block(TwoLayerRouter, i) for i in range(3)]
    model, session = build(blocks)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(1, 2, HIDDEN)
    with torch.no_grad():
        first = [block(x) for block in blocks]
        again = [block(x) for block in blocks]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert session.stats().total.calls == 6
    assert session.stats().failures == 0
    session.close()


def test_skipped_layers_are_left_out_and_the_others_predicted_as_ever() -> None:
    torch.manual_seed(3)
    blocks = [Block(LinearRouter, i) for i in range(5)]
    _, session = build(blocks)
    for block in blocks:
        predictions_of(session, block, torch.randn(1, 12, HIDDEN))
    lookahead = session._runner.lookahead  # type: ignore[union-attr]
    assert lookahead is not None
    x = torch.randn(1, HIDDEN)
    every = [(p.layer, p.expert_ids.tolist()) for p in lookahead.predict(0, x, x.numpy(), 3)]
    some = [(p.layer, p.expert_ids.tolist()) for p in lookahead.predict(0, x, x.numpy(), 3, skipped=2)]
    assert [layer for layer, _ in every] == [1, 2, 3]
    assert some == every[2:]
    assert lookahead.predict(3, x, x.numpy(), 3, skipped=2) == ()
    session.close()


def demanded(session: Session, blocks: list[Block]) -> list[int]:
    """How many layers ahead each planned layer was told of."""
    session.record_timeline(True)
    with torch.no_grad():
        for block in [*blocks, *blocks]:
            block(torch.randn(1, 4, HIDDEN))
    return [len(item.demand.predictions) for item in session.plans[len(blocks) :]]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [3, 2, 1, 0]),
        ({"lookahead": 1}, [1, 1, 1, 0]),
        ({"lookahead": 0}, [0, 0, 0, 0]),
        ({"policy": "hybrimoe/none/mrs"}, [0, 0, 0, 0]),
        ({"gpu_expert_slots": 1.0}, [0, 0, 0, 0]),
    ],
)
def test_only_what_the_policy_reads_is_predicted(settings: dict[str, Any], wanted: list[int]) -> None:
    blocks = [Block(LinearRouter, i) for i in range(4)]
    _, session = build(blocks, **settings)
    assert demanded(session, blocks) == wanted
    session.close()


def test_a_recorder_gets_predictions_without_slots_too() -> None:
    blocks = [Block(LinearRouter, i) for i in range(4)]
    _, session = build(blocks, gpu_expert_slots=0)
    for block in blocks:
        predictions_of(session, block, torch.randn(1, 4, HIDDEN))
    assert len(predictions_of(session, blocks[0], torch.randn(1, 4, HIDDEN))) == 3
    session.close()
