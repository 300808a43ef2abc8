"""Decode steps on a card: what lies between two calls of experts is one graph of the device, launched as a whole.

transformers launches some sixty kernels a layer, each by several microseconds of Python; a graph is launched in three.
The graphs are recorded from the model's own forward, which is interrupted at each call of experts: the piece before it
ends there, and the next one begins with the memory in which the experts' result will be.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from cpu_kernels import ExpertSpec
from gpu_kernels.errors import DriverError, GraphError
from gpu_kernels.graphs import Graph, RecordsGraphs
from gpu_kernels.step_kernels import StepKernels
from hybrimoe.dense.card_attention import cudnn_attention_off
from hybrimoe.experts.identity import add_identity_experts
from hybrimoe.experts.module import HOOKS, HybridExperts
from hybrimoe.generation.growing import GrowingLayer, growing_cache
from hybrimoe.runtime.exchanged import ExchangedExperts
from hybrimoe.runtime.resident import ResidentExperts
from hybrimoe.runtime.startup.budget import RECORDED_STEPS
from hybrimoe.runtime.token_loop.loop import NoLoopError
from hybrimoe.step.calls import StepCall, read_call
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.fixed_attention import attention_by
from hybrimoe.step.fixed_cache import (
    CacheLayer,
    FixedLayer,
    HeldLayer,
    fixable_layers,
    fixed_cache,
    states_of,
    unchanged_states,
)
from hybrimoe.step.forward import InPlaceOfForward
from hybrimoe.step.fused_norms import known_norms, norms_by
from hybrimoe.step.model_step import ModelStep
from hybrimoe.step.pieces import Answers, Counts, ExpertsPlace, Pieces, Routed, Within

MAX_SEQUENCES = 8
"""Sequences of a step that is captured."""
LEAST_ROOM = 1024
"""Room of a new buffer for keys and values: other buffers need other graphs, whose recording takes as long as some
twenty steps."""

LEAST_REPLAYS = 4
"""Of a recorded step whose cache then moves: where it was used less, recording again would not pay."""

EXACT, ROUNDED = 1e-4, 3e-2
"""Relative error of the logits at which a captured step is another one: of float32, and of rounded dtypes, where
attention over a buffer's room adds in another order than over the tokens held."""

ExpertsAnswer = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], torch.Tensor]
"""From experts, their forward and the arguments of a call to the output."""


class CapturedStep(ModelStep):
    """Answers decode steps of up to 8 sequences, one token each; the experts run as they always do.

    Where every expert has a slot, a step of one sequence is one graph, experts included. Where host and device split
    the experts, the pieces send the calls to the host, and a layer is one launch of a piece and one of experts.
    """

    def __init__(
        self, model: nn.Module, session: Any, device: torch.device, graphs: RecordsGraphs,
        kernels: StepKernels | None = None,
    ) -> None:  # fmt: skip
        """`kernels` are used where they can be; without them all is torch's."""
        experts = [module for module in model.modules() if isinstance(module, HybridExperts)]
        called = [part for module in experts for part in module.modules()]
        super().__init__(model, session, called)
        self._experts_hooks = [
            hooks for module in called for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.device = device
        self._n_kept = RECORDED_STEPS
        self.captures = 0
        """How often a step was recorded."""
        config: Any = model.config
        self.text_config = config.get_text_config(decoder=True)
        self._own = model.forward
        self._experts = experts
        self._graphs = graphs
        self._kernels = kernels or StepKernels()
        self._norms = [] if self._kernels.norm is None else known_norms(model, self._kernels.norm)
        self._captured: list[Pieces] = []
        self._pieces_ns = 0
        self._gave_up = self._sends_nothing = False
        self._answers = Answers(lambda place: place.run(session), session.settle, session.run_token)
        self._unreported: Counts = np.zeros((len(session.layers), 3))

    def answer(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output, by the captured step where that can answer."""
        if torch.is_grad_enabled() or not self.usable() or self.is_moved(kwargs):
            return own(*args, **kwargs)
        call = read_call(self.model.config, DynamicCache, args, kwargs)
        layers = None if call is None or call.mask is not None else self._layers_of(call)
        if call is None or layers is None:
            return own(*args, **kwargs)
        found = self._step(call, layers)
        if found is None:
            return own(*args, **kwargs)
        logits, output_type = found
        return output_type(logits=logits, past_key_values=call.caches[0])

    def next_logits(
        self, token_ids: Sequence[int], cache: Any, *, drafted: bool = False, shift: int = 0
    ) -> torch.Tensor | None:
        """As `ModelStep.next_logits`, of one token."""
        if len(token_ids) != 1 or type(cache) is not DynamicCache or not self.usable():
            return None
        n_past = cache.get_seq_length()
        call = StepCall(list(token_ids), 1, [n_past], [cache], [n_past + shift], None, 1, "decode")
        with torch.inference_mode():  # as `TextGenerator` computes prompts
            layers = self._layers_of(call) if n_past else None
            if layers is None:
                return None
            self.session.announce_step("decode")
            found = self._step(call, layers)
        return None if found is None else found[0][0]

    @property
    def differs_in_batches(self) -> str | None:
        """As `ModelStep.differs_in_batches`."""
        return "a captured step has one token of each sequence"

    @property
    def one_by_one(self) -> str | None:
        """As `ModelStep.one_by_one`."""
        return "the sequences of a captured step have one length"

    def keep_for(self, n_sequences: int) -> None:
        """As `ModelStep.keep_for`: the graphs of each."""
        self._n_kept = max(RECORDED_STEPS, n_sequences)

    @property
    def graph_bytes(self) -> int:
        """What the recorded steps that are kept take of the device."""
        return sum(pieces.pool_bytes for pieces in self._captured)

    @property
    def n_looped(self) -> int:
        """Steps that one compiled call has run, of those whose graphs are kept."""
        return sum(pieces.loop.n_tokens for pieces in self._captured if pieces.loop is not None)

    def undo(self) -> None:
        """Frees the graphs and lets go of the caches."""
        self._captured.clear()

    def report(self, stats: Any) -> None:
        """As `ModelStep.report`: the experts that were computed within graphs."""
        with self.lock:
            for layer, (n_calls, n_experts, us) in enumerate(self._unreported):
                if n_calls:
                    stats.of("decode", layer).ran_on_accelerator(int(n_calls), int(n_calls), int(n_experts), us)
            self._unreported[:] = 0

    def meter(self) -> tuple[dict[str, int], float]:
        """As `ModelStep.meter`: what the host was busy with the pieces."""
        return {"pieces": self._pieces_ns}, self._pieces_ns / 1000

    def try_out(self, token_ids: Sequence[int]) -> int:
        """Computes the last of some tokens in both ways, with the same outputs of the experts, and compares the logits,
        and the states that layers of linear attention are left in.

        Returns the number of calls of experts. Raises NotCompiled where the device does not record the step, or where
        it gives something else.
        """
        ids = torch.tensor([list(token_ids)], device=self.device)
        cache = growing_cache(self.text_config)
        with torch.no_grad(), cudnn_attention_off:
            before = self._own(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, return_dict=True)
            if before.past_key_values is not cache or type(cache) is not DynamicCache:
                raise NotCompiled(f"the model keeps its past in a {type(before.past_key_values).__name__}")
            twin = copy.deepcopy(cache)
            outputs: list[torch.Tensor] = []
            with self._experts_by(partial(_keep_output, outputs)):
                own = self._own(input_ids=ids[:, -1:], past_key_values=twin, use_cache=True, return_dict=True)
            found = self._logits_given(cache, token_ids[-1], outputs)
        allowed = EXACT if own.logits.dtype == torch.float32 else ROUNDED
        _require_close(found, own.logits[:, -1], allowed, "the logits")
        for number, (layer, expected) in enumerate(zip(cache.layers, twin.layers, strict=True)):
            for state, own_state in zip(states_of(layer), states_of(expected), strict=True):
                _require_close(state, own_state, allowed, f"a state of layer {number}")
        return len(outputs)

    def _logits_given(self, cache: DynamicCache, token_id: int, outputs: list[torch.Tensor]) -> torch.Tensor:
        """float32 logits [1, V] of a step on a cache, with these outputs of the experts."""
        n_past = cache.get_seq_length()
        call = StepCall([token_id], 1, [n_past], [cache], [n_past], None, 1, "decode")
        layers = self._layers_of(call)
        if layers is None:
            raise NotCompiled(
                "its cache has layers that are neither attention to all tokens, a window or those of an index, nor"
                " states of linear attention"
            )
        remaining = iter(outputs)
        try:
            pieces = self._pieces(call, layers)
            if len(pieces.experts) != len(outputs):
                raise NotCompiled(
                    f"{len(pieces.experts)} calls of experts in a captured step, {len(outputs)} in its own"
                )
            logits = pieces.run(self._numbers(call), Answers(lambda place: place.give(next(remaining)), _nothing))
            return logits[:, -1].float()
        finally:
            self._captured.clear()

    def _layers_of(self, call: StepCall) -> list[CacheLayer] | None:
        if call.n_new != 1 or call.n_sequences > MAX_SEQUENCES:
            return None
        return fixable_layers(call.caches[0], call.n_past[0], call.n_sequences, self.device)

    def usable(self) -> bool:
        """As `ModelStep.usable`, and no recording has failed."""
        return not self._gave_up and super().usable()

    def _step(self, call: StepCall, layers: list[CacheLayer]) -> tuple[torch.Tensor, type] | None:
        """Runs a step; a copy of its logits [sequences, 1, V], and the class of the model's output. None, with nothing
        changed, where transformers' forward is to run it: the cache moves with each token, or nothing can be recorded
        (any more), and then it runs all later ones, too."""
        with self.lock, torch.no_grad():
            pieces = None if self._moves(layers) else self._recorded(call, layers)
            if pieces is None:
                return None
            logits = pieces.run(self._numbers(call), self._answers)
            self._unreported += pieces.counts
            for each in pieces.held:
                each.advance()
            self._pieces_ns += pieces.busy_ns
            self.n_steps += 1
            return logits.clone(), type(pieces.output)

    def _moves(self, layers: list[CacheLayer]) -> bool:
        """Whether a cache has left the memory of its recorded step after few tokens: beams choose states for each."""
        return any(
            known.n_replays < LEAST_REPLAYS and known.was_of(layers) and not known.is_alive()
            for known in self._captured
        )

    def _recorded(self, call: StepCall, layers: list[CacheLayer]) -> Pieces | None:
        """The step's pieces; None, with a warning, where they cannot be recorded."""
        while True:
            within = self._within(call)
            try:
                return self._pieces(call, layers, within)
            except (GraphError, RuntimeError) as error:
                self._captured.clear()
                reason = str(error).strip().partition("\n")[0]
            if isinstance(within, ExchangedExperts):
                self._sends_nothing = True
                what = "captured steps call their experts layer by layer, more slowly"
            else:
                self._gave_up = True
                what = "decode steps are no longer captured, transformers' forward runs them"
            warnings.warn(f"{what}: {reason}", RuntimeWarning, stacklevel=3)
            if self._gave_up:
                return None

    def _within(self, call: StepCall) -> Within:
        """What takes part in the graphs, where nobody watches the experts."""
        if self.is_watched(self._experts_hooks):
            return None
        resident: ResidentExperts | None = self.session.resident() if call.n_sequences == 1 else None
        if resident is not None or self._sends_nothing:
            return resident
        exchanged: ExchangedExperts | None = self.session.exchanged()
        return exchanged

    def _numbers(self, call: StepCall) -> torch.Tensor:
        """On the host, as `Pieces.numbers`."""
        return torch.tensor([*call.token_ids, *call.positions, call.n_past[0]])

    def _pieces(self, call: StepCall, layers: list[CacheLayer], within: Within = None) -> Pieces:
        """The captured step for layers of a cache, with room for one token more; recorded now if there is none."""
        for layer in layers:
            if isinstance(layer, GrowingLayer):
                layer.least_room = LEAST_ROOM
                layer.grown(1)
        for number, known in enumerate(self._captured):
            if known.is_of(layers, call.n_sequences, within):
                self._captured.append(self._captured.pop(number))
                return self._captured[-1]
        self._captured = [known for known in self._captured if known.is_alive()][1 - self._n_kept :]
        pieces = self._capture(call.n_past[0], [HeldLayer(layer) for layer in layers], call.n_sequences, within)
        self._captured.append(pieces)
        return pieces

    def _capture(self, n_past: int, held: list[HeldLayer], n_sequences: int, within: Within) -> Pieces:
        """Records the model's forward. It runs once before, so that everything is there that is made on first use; what
        that writes into the cache is overwritten by the step itself, or undone.

        Raises GraphError, or whatever error the model has of work that cannot be recorded.
        """
        for each in held:
            each.clear(n_past)
        with torch.inference_mode(False):  # what every later step writes to, in whichever mode
            numbers = torch.zeros(2 * n_sequences + 1, dtype=torch.int64, device=self.device)
        numbers[-1] = n_past
        pieces = Pieces(numbers, held, within=within)
        cache = fixed_cache(held, numbers[-1])
        with unchanged_states(held), self._by_kernels(cache), self._graphs.recording():
            with self._experts_by(partial(_warm_up, within)):
                self._run_own(pieces, cache)
            self._graphs.begin()
            with self._experts_by(partial(self._interrupt, pieces)):
                pieces.output = self._run_own(pieces, fixed_cache(held, numbers[-1]))
            pieces.graphs.append(self._graphs.end())
            alone = self._experts_alone(pieces)
        pieces.pool_bytes = self._graphs.pool_bytes
        self._count(pieces, alone)
        self._loop_over(pieces)
        self.captures += 1
        return pieces

    def how_experts_are_called(self) -> str:
        """Between the pieces of steps of one sequence: by compiled code, or by Python, and then why. What the first
        step needs for that is ready."""
        if self.session.resident() is not None:
            return "which are part of the graphs while each has a slot"
        within: ExchangedExperts | None = self.session.exchanged()
        reason = "other lanes than one device's" if within is None else within.why_no_loop()
        return "all run by one compiled call" if reason is None else f"run by Python: {reason}"

    def _loop_over(self, pieces: Pieces) -> None:
        """Gives pieces that send all their calls to the host the loop that runs them without Python, or the reason why
        they have none."""
        calls = [place.sent for place in pieces.experts if place.sent is not None]
        if not isinstance(pieces.within, ExchangedExperts) or len(calls) < len(pieces.experts):
            return
        try:
            pieces.loop = pieces.within.loop_over(pieces.graphs, calls)
        except (NoLoopError, DriverError) as error:
            pieces.no_loop = str(error)

    @contextmanager
    def _by_kernels(self, cache: DynamicCache) -> Iterator[None]:
        """Within the block the kernels stand for torch's operators, in this step's model and over this cache."""
        with (
            cudnn_attention_off,
            attention_by(self._kernels.attention, [each for each in cache.layers if isinstance(each, FixedLayer)]),
            norms_by(self._kernels.norm, self._norms),
        ):
            yield

    def _experts_alone(self, pieces: Pieces) -> dict[ExpertSpec, Graph]:
        """Graphs of experts that a step has within its own, one for each kind of layer."""
        alone: dict[ExpertSpec, Graph] = {}
        for layer, call in pieces.inside:
            assert isinstance(pieces.within, ResidentExperts)
            spec = pieces.within.specs[layer]
            if spec not in alone:
                self._graphs.begin()
                pieces.within.run(layer, *call)
                alone[spec] = self._graphs.end()
        return alone

    def _count(self, pieces: Pieces, alone: dict[ExpertSpec, Graph]) -> None:
        """What a step adds to the session's counters, which its layers cannot count themselves."""
        pieces.counts = np.zeros_like(self._unreported)
        took_us = {spec: self._graphs.time_us(graph) for spec, graph in alone.items()}
        for layer, (_, ids, _) in pieces.inside:
            assert isinstance(pieces.within, ResidentExperts)
            pieces.counts[layer] += 1, ids.numel(), took_us[pieces.within.specs[layer]]

    def _run_own(self, pieces: Pieces, cache: DynamicCache) -> Any:
        n_sequences = len(pieces.numbers) // 2
        ids, positions, _ = pieces.numbers.split([n_sequences, n_sequences, 1])
        return self._own(
            input_ids=ids.view(-1, 1), position_ids=positions.view(-1, 1), past_key_values=cache, use_cache=True,
            return_dict=True,
        )  # fmt: skip

    def _interrupt(
        self, pieces: Pieces, module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Ends the piece before a call of experts and begins the next one; or has the call within the piece."""
        call, within = _routed(args, kwargs), pieces.within
        if within is not None and call is not None:
            layer = int(module.layer)  # type: ignore[arg-type]
            if isinstance(within, ResidentExperts):
                pieces.inside.append((layer, call))
                return _with_identity(module, within.run(layer, *call), call)
            if within.takes(layer, *call):
                return _with_identity(module, self._send(pieces, within, module, call), call)
        pieces.graphs.append(self._graphs.end())
        with torch.inference_mode(False):
            result = torch.zeros_like(_hidden(args, kwargs))
        pieces.experts.append(ExpertsPlace(module, args, kwargs, result))
        self._graphs.begin()
        return result

    def _send(self, pieces: Pieces, within: ExchangedExperts, module: nn.Module, call: Routed) -> torch.Tensor:
        """Ends the piece by sending a call to the host, records the experts that have slots, and begins the next piece
        by adding up what both have computed."""
        layer, (hidden, _, weights) = int(module.layer), call  # type: ignore[arg-type]
        exchange = within.send(*call)
        pieces.graphs.append(self._graphs.end())
        graph = None
        if within.has_slots:
            self._graphs.begin()
            within.compute(layer, exchange, hidden, weights)
            graph = self._graphs.end()
        sent = within.sent_call(layer, exchange, *call, graph)
        pieces.experts.append(ExpertsPlace(module, call, {}, sent=sent))
        self._graphs.begin()
        return within.combine(exchange, hidden)

    @contextmanager
    def _experts_by(self, answer: ExpertsAnswer) -> Iterator[None]:
        """Within the block `answer` stands for the experts, and no hook of theirs is called."""
        hooks = [{name: module.__dict__[name] for name in HOOKS} for module in self._experts]
        placed = [InPlaceOfForward(module, partial(answer, module)) for module in self._experts]
        for module in self._experts:
            module.__dict__.update({name: OrderedDict() for name in HOOKS})
        try:
            yield
        finally:
            for module, own, each in zip(self._experts, hooks, placed, strict=True):
                module.__dict__.update(own)
                each.undo()


def _keep_output(
    outputs: list[torch.Tensor], module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    n_before = len(outputs)
    output: torch.Tensor = own(*args, **kwargs)
    del outputs[n_before:]  # of calls inside this one (`hybrimoe.experts.sorted`)
    outputs.append(output.clone())
    return output


def _warm_up(
    within: Within, module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """Stands for experts in the run before a recording: they themselves only where they are recorded, too."""
    call = _routed(args, kwargs)
    if within is not None and call is not None:
        layer = int(module.layer)  # type: ignore[arg-type]
        if isinstance(within, ResidentExperts):
            return _with_identity(module, within.run(layer, *call), call)
        if within.takes(layer, *call):
            exchange = within.send(*call)
            if within.has_slots:
                within.compute(layer, exchange, call[0], call[2])
            return _with_identity(module, within.combine(exchange, call[0]), call)
    return torch.zeros_like(_hidden(args, kwargs))


def _with_identity(module: nn.Module, routed: torch.Tensor, call: Routed) -> torch.Tensor:
    """What experts with weights have computed, and what those add that are the identity, which nobody computes."""
    if not module.num_identity:
        return routed
    hidden, ids, weights = call
    n_experts, n_identity = int(module.num_experts), int(module.num_identity)  # type: ignore[arg-type]
    return add_identity_experts(routed, hidden, ids, weights, n_experts, n_identity)


def _require_close(found: torch.Tensor, expected: torch.Tensor, allowed: float, what: str) -> None:
    """Raises NotCompiled where a captured step has computed something else than transformers."""
    found, expected = found.float(), expected.float()
    error = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not error <= allowed:
        raise NotCompiled(f"its captured step differs: relative error {error:.1e} of {what}, allowed {allowed}")


def _nothing() -> None:
    """Experts whose outputs are given leave nothing to do."""


def _routed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed | None:
    """Hidden states, expert ids and weights of a call of experts; None of one that is of another form."""
    given = {**dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)), **kwargs}
    call = given.get("hidden_states"), given.get("top_k_index"), given.get("top_k_weights")
    return None if any(part is None for part in call) else call  # type: ignore[return-value]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states of a call of experts."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
