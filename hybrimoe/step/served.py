"""What whole and mixed compiled steps share: when they may stand for a model's forward, and what they count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache

from cpu_kernels.step.program import Part
from hybrimoe.step.angles import Angles
from hybrimoe.step.as_read import AsRead
from hybrimoe.step.caches import BoundLayers, fits
from hybrimoe.step.calls import StepCall, read_call
from hybrimoe.step.read_model import Reading
from scheduler import Phase

PHASES: tuple[Phase, ...] = ("prefill", "decode")
HARMLESS = ("transformers.utils.output_capturing", "hybrimoe.generation.module_parts")
"""Modules whose hooks do nothing in a step: transformers leaves its own in a model once it was asked for hidden states
or router logits; those of a profile time modules that are called."""


class ServedStep:
    """The base of both. Compiled work queues; what cannot be served is left to transformers, call by call.

    The KV cache is the caller's own, in the layers of `hybrimoe.generation.growing`, so the ways can alternate.
    """

    programs: list[BoundLayers]

    def __init__(self, model: nn.Module, session: Any, reading: Reading) -> None:
        self.model = model
        self.session = session
        self.reading = reading
        assert reading.ropes is not None
        self.angles = [Angles(source, doubled) for source, doubled in reading.ropes.sources]
        self.programs = []
        self.lock = threading.RLock()
        self._hooks = [
            hooks for module in model.modules() if module is not model
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]  # fmt: skip
        self.embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        self._as_read = AsRead(model)
        self.n_steps = 0
        self.step_us = 0.0
        self._counted: dict[Phase, list[float]] = {phase: [0, 0, 0.0] for phase in PHASES}  # calls, tokens, us
        self._experts_seen: dict[int, int] = {}

    def answer(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the model's forward, which is `own`, for a call."""
        raise NotImplementedError

    def next_logits(self, token_ids: Sequence[int], cache: Any, *, drafted: bool = False) -> torch.Tensor | None:
        """Logits [1, V] after new tokens of one sequence; None where the model's forward must be called.

        The short way of `answer` for callers that hold plain numbers and a cache. drafted: the tokens after the first
        are guesses about the next decode steps, and the logits are those after each of the n tokens, [n, V].
        """
        return None

    @property
    def differs_in_batches(self) -> str | None:
        """Why several tokens in one step may not get the bits that they get one by one; None where they do."""
        return f"this model has no compiled step for all of it, in which drafts are verified: {self.reading.reason}"

    def undo(self) -> None:
        """Takes away what the step has put into the model; whoever put it before the forward takes it from there."""

    def served_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall | None:
        """The call of the model's forward as the step sees it; None where transformers must answer."""
        if torch.is_grad_enabled() or not self.usable():
            return None
        call = read_call(self.model.config, self.reading.cache_type, args, kwargs)
        return call if call is not None and self.fits(call.cache, call.n_past, call.n_sequences) else None

    def usable(self) -> bool:
        """Whether the model is as it was when it was read, and nobody watches what the step would leave out."""
        return (
            not self.model.training
            and self.session.plain
            and self._as_read.unchanged()
            and not (any(self._hooks) and self._watched())
            and not torch_module._global_forward_hooks
            and not torch_module._global_forward_pre_hooks
        )

    def _watched(self) -> bool:
        """Whether somebody's hooks wait inside the model, for calls that the step would leave out."""
        return any(hook.__module__ not in HARMLESS for hooks in self._hooks for hook in hooks.values())

    def fits(self, cache: DynamicCache, n_past: int, n_sequences: int) -> bool:
        """Whether the cache's layers are such as the step reads."""
        used = {layer for program in self.programs for layer in program.compiled.cache_layers}
        return fits(cache, used, n_past, n_sequences)

    # Counting ---------------------------------------------------------------------------------------------------

    def count(self, call: StepCall, us: float) -> None:
        """Notes a step that took `us` microseconds of compiled work."""
        self.n_steps += 1
        self.step_us += us
        counted = self._counted[call.phase]
        counted[0] += 1
        counted[1] += call.n_sequences * call.n_new
        counted[2] += us

    def report(self, stats: Any) -> None:
        """Adds to a session's counters what was computed since the last report.

        Steps of both kinds since then share activated experts and time in proportion to their tokens.
        """
        with self.lock:
            shares = self._shares()
            activated = {
                layer: n for program in self.programs for layer, n in program.compiled.experts_activated.items()
            }
            tokens = sum(counted[1] for counted in self._counted.values())
            for phase, (calls, n_tokens, us) in self._counted.items():
                if not calls:
                    continue
                for number, total in activated.items():
                    layer = self.reading.session_layers[number]
                    n_experts = round((total - self._experts_seen.get(number, 0)) * n_tokens / tokens)
                    experts_us = us * shares[Part.EXPERTS] / len(activated)
                    stats.of(phase, layer).ran_on_cpu_often(int(calls), int(n_tokens), n_experts, experts_us)
            self._experts_seen = activated
            self._counted = {phase: [0, 0, 0.0] for phase in PHASES}

    def _shares(self) -> dict[Part, float]:
        ticks = [program.compiled.ticks for program in self.programs]
        total = sum(sum(each.values()) for each in ticks) or 1
        return {part: sum(each[part] for each in ticks) / total for part in Part}

    def meter(self) -> tuple[dict[str, int], float]:
        """Clock ticks of compiled work so far by part, in the thread that called, and its us; without that in modules
        that a profile times by themselves (`generation.module_parts`).

        Two readings say what was between them. (Shares of all ticks do not: the first step has little but its start in
        its us.)
        """
        with self.lock:
            programs, us = self._metered()
            ticks = [program.compiled.ticks for program in programs]
            return {part.name.lower(): sum(each[part] for each in ticks) for part in Part}, us

    def _metered(self) -> tuple[list[BoundLayers], float]:
        """The programs whose work `meter` tells, and its us."""
        return self.programs, self.step_us
