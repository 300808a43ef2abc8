"""Routing of the next MoE layers, predicted from the current layer's hidden state (HybriMoE, section 4.2).

Two ways, tried in this order for each layer and checked against the layer's real routing before they are used:

- `LinearGate`: the router is a matrix [E, H] whose logits, perhaps through a sigmoid and with a correction bias,
  choose the top k. All gates lie in one array, so the next three layers cost one matrix product.
- `ProbedGate`: the MoE block itself is run up to its call of the experts, which ends it by an exception. Works for any
  router. The block runs in an empty context, so that transformers' output recorders do not see the call.

A layer whose routing neither reproduces is not predicted.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gpu_kernels.waiting import wait_for_stream
from hybrimoe.runtime.layer_call.compiled import SIGMOID, SOFTMAX, predict_token
from scheduler import Prediction

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer]
Scoring = Literal["softmax", "sigmoid"]

MAX_TOKENS = 64
"""A prompt's routing is predicted from at most so many of its tokens, evenly spaced; counts are scaled up."""
CHECK_TOKENS = 16
"""Tokens on which a gate is checked against the real routing."""
MIN_AGREEMENT = 0.9
"""Share of real choices that a gate must reproduce on its own layer to be believed about later ones."""
MIN_LOGIT = np.float32(-80.0)
"""exp(80) is near the end of float32; a sigmoid there is 0."""
MAX_STACK_BYTES = 256 << 20
"""Float32 copies of all gates beyond this are not made; gates are then probed."""


class RoutingCaptured(BaseException):
    """Ends a probed block at its call of the experts. A BaseException, so that no model code swallows it."""


@dataclass(slots=True)
class ProbeSink:
    """Where a probed HybridExperts leaves its routing instead of computing."""

    top_k_index: torch.Tensor | None = None
    top_k_weights: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LinearGate:
    """weight float32 [E, H]; bias [E] is added to the logits, correction [E] to the scores that choose."""

    weight: Floats
    bias: Floats | None
    correction: Floats | None
    scoring: Scoring

    def scores(self, logits: Floats) -> tuple[Floats, Floats]:
        """Logits [T, E] (without bias) -> (what chooses, gate probabilities), float32 [T, E] each.

        Logits choose where there is no correction: scores far from the top round to the same number.
        """
        if self.bias is not None:
            logits = logits + self.bias
        if self.scoring == "softmax":
            raw = probabilities = _softmax(logits)
        else:
            raw = np.asarray(1.0 / (1.0 + np.exp(-np.maximum(logits, MIN_LOGIT))), np.float32)
            probabilities = np.asarray(raw / np.maximum(raw.sum(axis=1, keepdims=True), 1e-20), np.float32)
        return (logits if self.correction is None else raw + self.correction), probabilities


class PredictionSpace:
    """Predictions of one token for layers `first`..`last`, over arrays that each prediction fills anew."""

    __slots__ = ("ids", "predictions", "scores")

    def __init__(self, first: int, last: int, top_k: int) -> None:
        shape = last - first + 1, top_k
        self.ids, self.scores = np.empty(shape, np.int32), np.empty(shape, np.float32)
        ones = np.ones(top_k, np.float32)
        self.predictions = tuple(
            Prediction(first + at, ids, ones, scores)
            for at, (ids, scores) in enumerate(zip(self.ids, self.scores, strict=True))
        )


@dataclass(frozen=True, slots=True)
class GateStack:
    """All layers' linear gates in one array: weights [L, E, H], bias, correction [L, E], corrected, scoring [L].

    `halves`: the weights as bits of bfloat16. One token's prediction takes as long as reading them, and is a forecast:
    that rounding moves a logit by 0.4 % at most is less than what the layers between change.
    """

    weights: Floats
    halves: npt.NDArray[np.uint16]
    bias: Floats
    correction: Floats
    corrected: npt.NDArray[np.bool_]
    scoring: npt.NDArray[np.int64]
    spaces: dict[tuple[int, int, int], PredictionSpace] = field(default_factory=dict)

    @classmethod
    def of(cls, gates: Sequence[LinearGate]) -> GateStack:
        """Stacks gates of one shape."""
        zeros = np.zeros(len(gates[0].weight), np.float32)
        weights = np.stack([gate.weight for gate in gates])
        return cls(
            weights,
            torch.from_numpy(weights).bfloat16().view(torch.int16).numpy().view(np.uint16),
            np.stack([zeros if gate.bias is None else gate.bias for gate in gates]),
            np.stack([zeros if gate.correction is None else gate.correction for gate in gates]),
            np.array([gate.correction is not None for gate in gates]),
            np.array([SOFTMAX if gate.scoring == "softmax" else SIGMOID for gate in gates]),
        )

    def predict(self, x: Floats, first: int, last: int, top_k: int) -> tuple[Prediction, ...]:
        """Layers `first`..`last` from one token's hidden state float32 [H]; the next call of them fills it anew."""
        space = self.space(first, last, top_k)
        predict_token(
            self.halves, self.bias, self.correction, self.corrected, self.scoring, x, first, space.ids, space.scores
        )
        return space.predictions

    def space(self, first: int, last: int, top_k: int) -> PredictionSpace:
        """Where predictions for these layers lie."""
        space = self.spaces.get((first, last, top_k))
        if space is None:
            space = self.spaces[first, last, top_k] = PredictionSpace(first, last, min(top_k, self.weights.shape[1]))
        return space


@dataclass(frozen=True, slots=True)
class ProbedGate:
    """Runs `block` on a hidden state [T, H] and returns the routing that its experts were called with."""

    run: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]


Gate = LinearGate | ProbedGate


class Lookahead:
    """Predicts the routing of the next `depth` layers. `blocks[l]` is the module that holds layer l's experts."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        experts: Sequence[nn.Module],
        num_experts: Sequence[int],
        depth: int,
        probe: Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None],
    ) -> None:
        self._blocks, self._experts, self._num_experts = list(blocks), list(experts), list(num_experts)
        self._depth = depth
        self._probe = probe
        self._gates: list[Gate | None] = [None] * len(self._blocks)
        self._learned = [False] * len(self._blocks)
        self._stack: GateStack | None = None
        self._budget_bytes = MAX_STACK_BYTES
        self.knows_all = False
        """Whether every layer's gate was looked for."""

    @property
    def stacked(self) -> bool:
        """Whether all gates are known, and predict from the host's copy of the hidden states alone."""
        return self._stack is not None

    @property
    def stack(self) -> GateStack | None:
        """All gates, where they are known and of one shape."""
        return self._stack

    def learned(self, layer: int) -> bool:
        """True once `learn` was called for the layer."""
        return self._learned[layer]

    def gate(self, layer: int) -> Gate | None:
        """How the layer is predicted; None where nothing reproduced its routing."""
        return self._gates[layer]

    def learn(self, layer: int, hidden: torch.Tensor, top_k_index: Ints) -> None:
        """Finds the layer's gate from one real call: hidden [T, H], top_k_index [T, k]."""
        self._learned[layer] = True
        some = slice(0, CHECK_TOKENS)
        x, index = hidden[some].detach(), np.asarray(top_k_index)[some]
        self._gates[layer] = self._linear_gate(layer, x, index) or self._probed_gate(layer, x, index)
        self.knows_all = all(self._learned)
        if self.knows_all:
            self._build_stack()

    def predict(
        self, layer: int, hidden: torch.Tensor, host_hidden: Floats, top_k: int, depth: int | None = None,
        skipped: int = 0,
    ) -> tuple[Prediction, ...]:  # fmt: skip
        """Predictions for the layers after `layer` from its hidden state [..., H]; nearest first, at most `depth`.

        Those of one token may leave the `skipped` nearest layers out. They may be a workspace, which the next
        prediction at this layer fills anew.
        """
        last = min(layer + (self._depth if depth is None else depth), len(self._gates) - 1)
        if last <= layer or not (self.knows_all or all(self._learned[layer + 1 : last + 1])):
            return ()
        n_tokens = len(host_hidden)
        if n_tokens == 1 and self._stack is not None:
            first = layer + 1 + skipped
            return self._stack.predict(host_hidden[0], first, last, top_k) if first <= last else ()
        stride = -(-n_tokens // MAX_TOKENS)
        x = host_hidden if stride == 1 else np.ascontiguousarray(host_hidden[::stride])
        scale = n_tokens / len(x)
        found = []
        logits = self._stacked_logits(x, layer + 1, last)
        for ahead in range(layer + 1, last + 1):
            gate = self._gates[ahead]
            if isinstance(gate, LinearGate):
                own = logits[ahead - layer - 1] if logits is not None else x @ gate.weight.T
                found.append(_from_scores(ahead, *gate.scores(own), top_k, scale))
            elif gate is not None:
                routing = gate.run(hidden.reshape(host_hidden.shape)[::stride])
                if routing is not None:
                    found.append(_from_routing(ahead, *routing, self._num_experts[ahead], scale))
        return tuple(found)

    def _stacked_logits(self, x: Floats, first: int, last: int) -> Floats | None:
        """[layers, T, E] by one product where all gates are linear and of one shape."""
        if self._stack is None:
            return None
        weights = self._stack.weights[first : last + 1]
        n_layers, n_experts, _ = weights.shape
        flat = x @ weights.reshape(n_layers * n_experts, -1).T
        return flat.reshape(len(x), n_layers, n_experts).transpose(1, 0, 2)

    def _build_stack(self) -> None:
        gates = [gate for gate in self._gates if isinstance(gate, LinearGate)]
        if len(gates) == len(self._gates) and len({gate.weight.shape for gate in gates}) == 1:
            self._stack = GateStack.of(gates)
            for layer, gate in enumerate(gates):
                self._gates[layer] = LinearGate(self._stack.weights[layer], gate.bias, gate.correction, gate.scoring)

    def _linear_gate(self, layer: int, x: torch.Tensor, index: Ints) -> LinearGate | None:
        wait_for_stream(x.device, "a layer's inputs")
        host = x.float().cpu().numpy()
        best: tuple[float, LinearGate] | None = None
        for gate in _candidates(self._blocks[layer], self._experts[layer], self._num_experts[layer], x.shape[1]):
            chosen, _ = gate.scores(host @ gate.weight.T)
            agreement = _agreement(_top(chosen, index.shape[1]), index)
            if agreement >= MIN_AGREEMENT and (best is None or agreement > best[0]):
                best = (agreement, gate)
        if best is None or best[1].weight.nbytes > self._budget_bytes:
            return None
        self._budget_bytes -= best[1].weight.nbytes
        return best[1]

    def _probed_gate(self, layer: int, x: torch.Tensor, index: Ints) -> ProbedGate | None:
        block = self._blocks[layer]
        gate = ProbedGate(lambda hidden: self._probe(block, hidden))
        routing = gate.run(x)
        if routing is None or _agreement(routing[0].cpu().numpy(), index) < MIN_AGREEMENT:
            return None
        return gate


def run_probe(block: nn.Module, hidden: torch.Tensor, sink: ProbeSink) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Runs `block` on hidden [T, H] until its experts are called; the caller arranges that they fill `sink`.

    None where the block does not take a hidden state alone, or does not reach its experts.
    """

    def call() -> None:
        with torch.no_grad():
            block.forward(hidden.detach().unsqueeze(0))

    try:
        contextvars.Context().run(call)
    except RoutingCaptured:
        pass
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return None
    if sink.top_k_index is None or sink.top_k_weights is None or len(sink.top_k_index) != len(hidden):
        return None
    return sink.top_k_index, sink.top_k_weights


def _candidates(block: nn.Module, experts: nn.Module, num_experts: int, hidden: int) -> list[LinearGate]:
    """Linear gates that the block may have: every [E, H] weight outside its experts, with each way of scoring."""
    gates = []
    correction = _vector(block, "e_score_correction_bias", num_experts)
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if module is experts or not isinstance(weight, torch.Tensor) or tuple(weight.shape) != (num_experts, hidden):
            continue
        matrix = weight.detach().float().cpu().numpy()
        bias = _vector(module, "bias", num_experts)
        own = _vector(module, "e_score_correction_bias", num_experts)
        shift = correction if own is None else own
        gates.append(LinearGate(matrix, bias, None, "softmax"))
        gates.append(LinearGate(matrix, bias, shift, "sigmoid"))
        if shift is not None:
            gates.append(LinearGate(matrix, bias, shift, "softmax"))
    return gates


def _vector(module: nn.Module, name: str, size: int) -> Floats | None:
    value = getattr(module, name, None)
    if not isinstance(value, torch.Tensor) or value.numel() != size:
        return None
    return value.detach().float().cpu().numpy().reshape(-1)


def _agreement(predicted: Ints, index: Ints) -> float:
    """Share of the real (valid) choices that were predicted for the same token."""
    valid = index >= 0
    if not valid.any():
        return 0.0
    return float((index[:, :, None] == predicted[:, None, :]).any(axis=2)[valid].mean())


def _top(scores: Floats, k: int) -> npt.NDArray[np.intp]:
    """[T, k]: the k largest of each row, in no particular order."""
    k = min(k, scores.shape[1])
    return np.argpartition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k :]


def _from_scores(layer: int, chosen: Floats, probabilities: Floats, top_k: int, scale: float) -> Prediction:
    top = _top(chosen, top_k)
    if len(top) == 1:
        ids = np.sort(top[0]).astype(np.int32)
        return Prediction(layer, ids, np.full(len(ids), scale, np.float32), probabilities[0, ids])
    counts = np.bincount(top.reshape(-1), minlength=chosen.shape[1])
    ids = np.flatnonzero(counts).astype(np.int32)
    return Prediction(layer, ids, (counts[ids] * scale).astype(np.float32), probabilities.mean(axis=0)[ids])


def _from_routing(
    layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int, scale: float
) -> Prediction:
    index = top_k_index.cpu().numpy().reshape(-1)
    weights = top_k_weights.float().cpu().numpy().reshape(-1)
    valid = (index >= 0) & (index < num_experts)
    counts = np.bincount(index[valid], minlength=num_experts)
    sums = np.bincount(index[valid], weights=weights[valid], minlength=num_experts) / len(top_k_index)
    ids = np.flatnonzero(counts).astype(np.int32)
    return Prediction(layer, ids, (counts[ids] * scale).astype(np.float32), sums[ids].astype(np.float32))


def _softmax(logits: Floats) -> Floats:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True), dtype=np.float32)
