"""What whole and mixed compiled steps share: which calls they serve, and what they count."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from cpu_kernels.step.program import Part
from hybrimoe.step.angles import Angles
from hybrimoe.step.caches import BoundLayers, fits
from hybrimoe.step.calls import StepCall, read_call
from hybrimoe.step.model_step import ModelStep
from hybrimoe.step.prompts import StatePrompts
from hybrimoe.step.read_model import Reading
from hybrimoe.step.states import States
from scheduler import Phase

PHASES: tuple[Phase, ...] = ("prefill", "decode")


class ServedStep(ModelStep):
    """The base of both. Compiled work queues; what cannot be served is left to transformers, call by call."""

    programs: list[BoundLayers]

    def __init__(self, model: nn.Module, session: Any, reading: Reading) -> None:
        super().__init__(model, session)
        self.reading = reading
        assert reading.ropes is not None
        self.angles = [Angles(source, doubled) for source, doubled in reading.ropes.sources]
        self.programs = []
        self._prompts: StatePrompts | None = None
        self.states: dict[int, States] = {}
        """Of the layers whose states the programs change, what these are like."""
        self._counted: dict[Phase, list[float]] = {phase: [0, 0, 0.0] for phase in PHASES}  # calls, tokens, us
        self._experts_seen: dict[int, int] = {}

    def answer_prompts(self, n_threads: int) -> None:
        """From now on layers with states compute prompts in part by compiled calls."""
        self._prompts = StatePrompts(
            self.reading.prompts, self.reading.states, self.reading.cache_type, n_threads, self.usable
        )

    def undo(self) -> None:
        """As `ModelStep.undo`."""
        if self._prompts is not None:
            self._prompts.undo()

    @property
    def differs_in_batches(self) -> str | None:
        """As `ModelStep.differs_in_batches`."""
        return f"this model has no compiled step for all of it, in which drafts are verified: {self.reading.reason}"

    def served_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall | None:
        """The call of the model's forward as the step sees it; None where transformers must answer it."""
        if torch.is_grad_enabled() or not self.usable() or self.is_moved(kwargs):
            return None
        call = read_call(self.model.config, self.reading.cache_type, args, kwargs)
        if call is None or not self.fits(call.caches[0], call.n_past[0], call.n_sequences):
            return None
        if self.states and call.hides_new_tokens:  # which must not reach states
            return None
        most = min(program.compiled.most_rows(call.n_past[0] + call.n_new) for program in self.programs)
        return call if call.n_sequences * call.n_new <= most else None

    def usable(self) -> bool:
        """As `ModelStep.usable`, and the experts are computed on the CPU as the router says, watched by nobody."""
        return self.session.plain and super().usable()

    def fits(self, cache: DynamicCache, n_past: int, n_sequences: int) -> bool:
        """Whether the cache's layers are such as the step reads."""
        used = {layer for program in self.programs for layer in program.compiled.cache_layers}
        indexed = {layer for program in self.programs for layer in program.compiled.index_layers}
        return fits(cache, used, indexed, self.states, n_past, n_sequences)

    @property
    def one_by_one(self) -> str | None:
        """As `ModelStep.one_by_one`."""
        return f"this model has no compiled step for all of it: {self.reading.reason}"

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
        """As `ModelStep.meter`."""
        with self.lock:
            programs, us = self._metered()
            ticks = [program.compiled.ticks for program in programs]
            return {part.name.lower(): sum(each[part] for each in ticks) for part in Part}, us

    def _metered(self) -> tuple[list[BoundLayers], float]:
        """The programs whose work `meter` tells, and its us."""
        return self.programs, self.step_us
