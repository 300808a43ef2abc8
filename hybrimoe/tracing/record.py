"""Records the routing of a model while it generates: ids, weights, and what the next layers' gates predict.

Hooks on the experts modules see (hidden, top_k_index, top_k_weights) of every call, on plain transformers models and on
injected ones alike. At the end of a step the gates of the next layers are applied to each layer's hidden state, for all
tokens, which gives ``predicted_ids``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hybrimoe.errors import ModelError
from hybrimoe.experts import layout as experts_layout
from hybrimoe.experts.module import HybridExperts
from hybrimoe.runtime.layer_call.lookahead import LinearGate, Lookahead, ProbeSink, RoutingCaptured, run_probe
from scheduler.demand import Phase
from scheduler.traces.trace import PHASE_CODES, Trace

if TYPE_CHECKING:
    from hybrimoe.generation import SamplingOptions, TextGenerator

DEFAULT_PROMPTS = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "Emma was sitting by the window when her father came into the room and said",
    "The family of Dashwood had long been settled in the county, and their house",
    "She could not help thinking of what had passed between them at the ball,",
    "In the beginning God created the heaven and the earth. And the earth was",
    "And it came to pass in those days that the king went up to the city, and",
    "Blessed are they that hear the word, for they shall",
    "The LORD said unto Moses, Speak unto the children of Israel, saying,",
    "The CREATE TABLE command creates a new table in the current database. The options",
    "To restore a backup with pg_dump, first stop the server and then",
    "An index can be used to speed up queries that select rows by",
    "The query planner estimates the cost of each plan from the statistics that",
)
"""What `hybrimoe trace record` uses where no prompt is given: the demo model's three kinds of text."""
DEFAULT_HORIZON = 3
#: Predicted experts kept for each of a token's top-k, best first.
WIDTH_PER_TOP_K = 2
ABSENT = -1
SKETCH_SEED = 0


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a layer's experts: hidden [T, H], top_k_index int16 [T, k], top_k_weights float16 [T, k]."""

    hidden: torch.Tensor
    index: NDArray[np.int16]
    weights: NDArray[np.float16]


@dataclass(slots=True)
class Recorded:
    """Arrays of one step, [T, layers, ...]."""

    ids: NDArray[np.int16]
    weights: NDArray[np.float16]
    predicted: NDArray[np.int16]
    sequence: int
    phase: Phase
    embeddings: NDArray[np.float16] | None = None
    gate_scores: NDArray[np.float16] | None = None
    token_ids: NDArray[np.int32] | None = None
    hidden: NDArray[np.float16] | None = None


@dataclass(slots=True)
class RoutingTap:
    """Listens to a model. Use :func:`listening`; call :meth:`begin_sequence` before each new text.

    ``full_scores``: the gate's probabilities of all experts are kept, too. ``hidden``: so many random projections of
    each layer's hidden state are (0: none; at least its width: the state itself).
    Within a step the last call of a layer counts: earlier ones are lookahead probes of the runtime.
    """

    model: nn.Module
    horizon: int = DEFAULT_HORIZON
    full_scores: bool = False
    hidden: int = 0
    steps: list[Recorded] = field(default_factory=list)
    _experts: list[nn.Module] = field(default_factory=list)
    _num_experts: list[int] = field(default_factory=list)
    _calls: dict[int, LayerCall] = field(default_factory=dict)
    _lookahead: Lookahead | None = None
    _sink: ProbeSink | None = None
    _sequence: int = -1
    _fresh: bool = True
    _embeddings: NDArray[np.float16] | None = None
    _token_ids: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        paths, self._experts = experts_modules(self.model)
        blocks = [self.model.get_submodule(path.rpartition(".")[0]) for path in paths]
        self._num_experts = [num_experts(module) for module in self._experts]
        self._lookahead = Lookahead(blocks, self._experts, self._num_experts, self.horizon, self._probe)

    def begin_sequence(self) -> None:
        """The next step starts a new sequence with its prefill."""
        self.flush()
        self._sequence += 1
        self._fresh = True

    def flush(self) -> None:
        """Turn the calls of the step that has ended into arrays."""
        if len(self._calls) < len(self._experts):
            self._calls.clear()
            return
        calls = [self._calls[layer] for layer in range(len(self._experts))]
        self._calls = {}
        n_tokens = calls[0].index.shape[0]
        phase: Phase = "prefill" if self._fresh or n_tokens > 1 else "decode"
        self._fresh = False
        ids = np.stack([call.index for call in calls], axis=1)
        weights = np.stack([call.weights for call in calls], axis=1)
        predicted = self._predict(calls)
        scores = self._all_scores(calls) if self.full_scores else None
        states = np.stack([sketch(call.hidden, self.hidden) for call in calls], axis=1) if self.hidden else None
        self.steps.append(
            Recorded(ids, weights, predicted, self._sequence, phase, self._embeddings, scores, self._token_ids, states)
        )

    def heard(self, layer: int, arguments: tuple[Any, ...]) -> None:
        """A layer's experts are called."""
        hidden, index, weights = arguments[:3]
        if self._sink is not None:
            self._sink.top_k_index, self._sink.top_k_weights = index, weights
            raise RoutingCaptured
        chosen = _with_weights(index, self._num_experts[layer])
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        self._calls[layer] = LayerCall(flat, chosen, weights.detach().float().cpu().numpy().astype(np.float16))

    def given(self, ids: torch.Tensor) -> None:
        """The token ids of the step under way, [..., T]."""
        self._token_ids = ids.detach().reshape(-1).cpu().numpy().astype(np.int32)

    def embedded(self, output: torch.Tensor) -> None:
        """The input embeddings of the step under way, [..., T, H]."""
        self._embeddings = output.detach().reshape(-1, output.shape[-1]).float().cpu().numpy().astype(np.float16)

    def _predict(self, calls: Sequence[LayerCall]) -> NDArray[np.int16]:
        """int16 [T, layers, horizon, width]."""
        lookahead = self._lookahead
        assert lookahead is not None
        for layer, call in enumerate(calls):
            if not lookahead.learned(layer):
                lookahead.learn(layer, call.hidden, call.index)
        n_tokens, top_k = calls[0].index.shape
        width = min(WIDTH_PER_TOP_K * top_k, min(self._num_experts))
        found = np.full((n_tokens, len(calls), self.horizon, width), ABSENT, np.int16)
        for layer, call in enumerate(calls):
            host = call.hidden.float().cpu().numpy()
            for ahead in range(1, min(self.horizon, len(calls) - 1 - layer) + 1):
                best = self._gate_choice(layer + ahead, call.hidden, host, width)
                if best is not None:
                    found[:, layer, ahead - 1, : best.shape[1]] = best
        return found

    def _all_scores(self, calls: Sequence[LayerCall]) -> NDArray[np.float16]:
        """float16 [T, layers, E]: each layer's own gate on its hidden states. Raises ModelError for a gate that is not
        a matrix: its probabilities are not known."""
        assert self._lookahead is not None
        n_experts = max(self._num_experts)
        found = np.zeros((calls[0].index.shape[0], len(calls), n_experts), np.float16)
        for layer, call in enumerate(calls):
            gate = self._lookahead.gate(layer)
            if not isinstance(gate, LinearGate):
                raise ModelError(
                    f"the gate of MoE layer {layer} is not a matrix that we read, so its probabilities of all experts"
                    " are not known; record without full scores"
                )
            _, chances = gate.scores(call.hidden.float().cpu().numpy() @ gate.weight.T)
            found[:, layer, : chances.shape[1]] = chances
        return found

    def _gate_choice(
        self, layer: int, hidden: torch.Tensor, host: NDArray[np.float32], width: int
    ) -> NDArray[np.int16] | None:
        assert self._lookahead is not None
        gate = self._lookahead.gate(layer)
        if gate is None:
            return None
        if isinstance(gate, LinearGate):
            scores, _ = gate.scores(host @ gate.weight.T)
            return np.argsort(-scores, axis=1, kind="stable")[:, :width].astype(np.int16)
        routing = gate.run(hidden)
        return None if routing is None else _with_weights(routing[0], self._num_experts[layer])[:, :width]

    def _probe(self, block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        self._sink = ProbeSink()
        try:
            return run_probe(block, hidden, self._sink)
        finally:
            self._sink = None

    def trace(self, source: str, licence: str, name: str = "recorded") -> Trace:
        """Everything heard so far. Raises ModelError when no complete step was."""
        self.flush()
        if not self.steps:
            raise ModelError("nothing was recorded: the model ran no complete step with its experts")
        n_tokens = [len(step.ids) for step in self.steps]
        first = self.steps[0]
        meta = {
            "model": source,
            "num_layers": first.ids.shape[1],
            "num_experts": max(self._num_experts),
            "top_k": first.ids.shape[2],
            "source": f"hybrimoe trace record {source}",
            "licence": licence,
            "horizon": self.horizon,
        }
        return Trace(
            expert_ids=np.concatenate([step.ids for step in self.steps]),
            sequence=np.repeat([step.sequence for step in self.steps], n_tokens).astype(np.int32),
            phase=np.repeat([PHASE_CODES[step.phase] for step in self.steps], n_tokens).astype(np.uint8),
            meta=meta,
            expert_weights=np.concatenate([step.weights for step in self.steps]),
            predicted_ids=np.concatenate([step.predicted for step in self.steps]),
            embeddings=_joined([step.embeddings for step in self.steps]),
            gate_scores=_joined([step.gate_scores for step in self.steps]),
            token_ids=_joined([step.token_ids for step in self.steps]),
            hidden=_joined([step.hidden for step in self.steps]),
            name=name,
        )


def sketch(hidden: torch.Tensor, width: int) -> NDArray[np.float16]:
    """float16 [T, width] of hidden states [T, H]: random projections that keep lengths and angles on average, of states
    that are scaled to a root mean square of 1, as the router's norm leaves them up to its weights; the scaled states
    where ``width`` is at least H. The projection depends on H and ``width`` alone."""
    states = hidden.float().cpu().numpy()
    states = states / np.sqrt(np.mean(np.square(states), axis=1, keepdims=True) + np.float32(1e-12))
    n = states.shape[1]
    if width < n:
        states = states @ _projection(n, width)
    return np.asarray(states, np.float16)


@lru_cache(maxsize=4)
def _projection(n: int, width: int) -> NDArray[np.float32]:
    """[n, width], columns of length 1 on average."""
    drawn = np.random.default_rng(SKETCH_SEED).standard_normal((n, width), np.float32)
    return np.asarray(drawn / np.float32(np.sqrt(n)), np.float32)


Kept = TypeVar("Kept", bound=np.generic)


def _joined(parts: list[NDArray[Kept] | None]) -> NDArray[Kept] | None:
    """The steps' arrays as one; None where a step has none."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _with_weights(index: torch.Tensor, n_experts: int) -> NDArray[np.int16]:
    """The ids of experts with weights, ABSENT in place of all others (identity experts, padding)."""
    ids = index.detach().cpu().numpy().astype(np.int64)
    return np.where((ids >= 0) & (ids < n_experts), ids, ABSENT).astype(np.int16)


def experts_modules(model: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """Paths and modules of a model's experts in layer order, replaced or not. Raises ModelError for a dense model."""
    found: list[tuple[str, nn.Module]] = [
        (path, module) for path, module in model.named_modules() if isinstance(module, HybridExperts)
    ]
    found = found or experts_layout.find_experts(model)
    if not found:
        raise ModelError(f"{type(model).__name__} has no experts: there is no routing to record")
    return [path for path, _ in found], [module for _, module in found]


def num_experts(module: nn.Module) -> int:
    """Number of experts with weights of an experts module."""
    return module.num_experts if isinstance(module, HybridExperts) else experts_layout.read(module).num_experts


@contextmanager
def listening(
    model: nn.Module, horizon: int = DEFAULT_HORIZON, embeddings: bool = False, full_scores: bool = False,
    token_ids: bool = True, hidden: int = 0,
) -> Iterator[RoutingTap]:  # fmt: skip
    """Hooks on ``model`` for the block; the tap keeps what it heard: with ``token_ids`` the tokens too, with
    ``embeddings`` their embeddings, with ``full_scores`` the gates' probabilities of all experts, with ``hidden`` so
    many projections of the hidden states."""
    tap = RoutingTap(model, horizon, full_scores, hidden)
    handles = [model.register_forward_pre_hook(lambda *_: tap.flush())]
    if token_ids:
        handles.append(input_embeddings(model).register_forward_hook(lambda _, given, __: tap.given(given[0])))
    if embeddings:
        handles.append(input_embeddings(model).register_forward_hook(lambda _, __, output: tap.embedded(output)))
    for layer, module in enumerate(tap._experts):
        handles.append(module.register_forward_pre_hook(_listener(tap, layer), with_kwargs=True))
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


def input_embeddings(model: nn.Module) -> nn.Module:
    """The module that turns token ids into vectors. Raises ModelError where the model does not say which it is."""
    find = getattr(model, "get_input_embeddings", None)
    found = find() if callable(find) else None
    if not isinstance(found, nn.Module):
        raise ModelError(f"{type(model).__name__} does not name its input embeddings (get_input_embeddings)")
    return found


def _listener(tap: RoutingTap, layer: int) -> Any:
    names = ("hidden_states", "top_k_index", "top_k_weights")

    def hook(module: nn.Module, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap.heard(layer, (*arguments, *(kwargs[name] for name in names[len(arguments) :])))

    return hook


def record_texts(
    generator: TextGenerator, prompts: Sequence[str], options: SamplingOptions, *, source: str, licence: str,
    horizon: int = DEFAULT_HORIZON, embeddings: bool = False, full_scores: bool = False, token_ids: bool = True,
    hidden: int = 0,
) -> Trace:  # fmt: skip
    """Generate a reply to each prompt and record its routing; each prompt is one sequence."""
    with listening(generator.model, horizon, embeddings, full_scores, token_ids, hidden) as tap:
        for prompt in prompts:
            tap.begin_sequence()
            for _ in generator.reply(generator.encode(prompt), options):
                pass
        return tap.trace(source, licence)
