"""The compiled step of a whole model: stands before its forward and answers the calls that it can serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from cpu_kernels.host.isa import detect
from cpu_kernels.host.threads import torch_threads
from cpu_kernels.step.compiled import CompiledStep
from cpu_kernels.step.program import MAX_LOGITS, MAX_ROWS
from hybrimoe.errors import ModelError
from hybrimoe.step.caches import BoundLayers, begin
from hybrimoe.step.calls import StepCall, tokens_held
from hybrimoe.step.read_model import Reading
from hybrimoe.step.served import ServedStep
from scheduler import Phase


class Step(ServedStep):
    """A model whose every layer is compiled: token ids to logits in one call."""

    def __init__(self, model: nn.Module, session: Any, reading: Reading, n_threads: int) -> None:
        if reading.model is None:
            raise ModelError(f"this model has no compiled step: {reading.reason}")
        super().__init__(model, session, reading)
        self._compiled = CompiledStep(reading.model, n_threads, detect().isa.name)
        self._bound = BoundLayers(self._compiled, self.angles)
        self.programs = [self._bound]
        self._no_rows = {layer: reading.no_rows[layer] for layer in set(self._compiled.cache_layers)}
        self.states = {layer: reading.states[layer] for layer in self._compiled.state_layers}
        self.answer_prompts(n_threads)

    def answer(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output, computed here where that is possible."""
        call = self.served_call(args, kwargs)
        if call is None:
            return own(*args, **kwargs)
        assert self.reading.output_type is not None
        return self.reading.output_type(logits=self._logits(call), past_key_values=call.caches[0])

    def next_logits(
        self, token_ids: Sequence[int], cache: Any, *, drafted: bool = False, shift: int = 0
    ) -> torch.Tensor | None:
        """As `ModelStep.next_logits`."""
        n_new = len(token_ids)
        if drafted and n_new > 1 and self.states:  # which no draft can be taken out of again
            return None
        if n_new > (MAX_LOGITS if drafted else MAX_ROWS) or not self.usable():
            return None
        n_past = self._n_past(cache)
        if n_past is None:
            return None
        phase: Phase = "decode" if drafted or n_new == 1 else "prefill"
        most = n_new if drafted or n_new == 1 else self._compiled.most_rows(n_past + n_new)
        with torch.inference_mode():
            for first in range(0, n_new, most):
                part = list(token_ids[first : first + most])
                past, n_logits = n_past + first, len(part) if drafted else 1
                positions = list(range(past + shift, past + shift + len(part)))
                logits = self._logits(StepCall(part, len(part), [past], [cache], positions, None, n_logits, phase))
        return logits[0]

    def logits_of_each(
        self, token_ids: Sequence[int], caches: Sequence[Any], shifts: Sequence[int] = ()
    ) -> torch.Tensor | None:
        """As `ModelStep.logits_of_each`."""
        if not 0 < len(token_ids) <= MAX_LOGITS or self.one_by_one is not None or not self.usable():
            return None
        n_past = [n for cache in caches if (n := self._n_past(cache))]
        if len(n_past) < len(caches):
            return None
        positions = [n + shift for n, shift in zip(n_past, shifts, strict=True)] if shifts else n_past
        call = StepCall(list(token_ids), 1, n_past, list(caches), positions, None, 1, "decode")
        with torch.inference_mode():
            return self._logits(call)[:, 0]

    def _n_past(self, cache: Any) -> int | None:
        """Tokens of the one sequence that a cache holds; None where the step cannot go on from it."""
        is_known = isinstance(cache, DynamicCache) and type(cache) is self.reading.cache_type
        if not is_known:
            return None
        n_past = tokens_held(cache)
        if not n_past:
            if self._in_a_plane:  # the model's own forward forgets the images of its latest prompt
                return None
            begin(cache, self._no_rows, self.states)
        return n_past if self.fits(cache, n_past, 1) else None

    @property
    def differs_in_batches(self) -> str | None:
        """As `ModelStep.differs_in_batches`."""
        if self.states:
            return f"layer {min(self.states)} keeps a state, which gives no drafted token back"
        return self.one_by_one

    @property
    def one_by_one(self) -> str | None:
        """As `ModelStep.one_by_one`."""
        if any(angles.changes for angles in self.angles):
            return "the angles of the model's rotary embedding depend on the longest position of a step"
        return None

    def _logits(self, call: StepCall) -> torch.Tensor:
        """Runs the step; logits [sequences, kept, V] in the dtype that the model itself gives."""
        if min(call.token_ids) < 0 or max(call.token_ids) >= self.embedding.shape[0]:
            raise IndexError(f"token ids must be below {self.embedding.shape[0]}, found {call.token_ids}")
        with self.lock, torch_threads(1):  # more would spin on after the copy of the logits
            us = self._bound.run(call)
            n_each = call.n_logits if call.n_sequences == 1 else call.n_new
            found = torch.from_numpy(self._compiled.logits[: call.n_sequences * n_each])
            rows = found.view(call.n_sequences, n_each, -1)
            logits = rows[:, n_each - call.n_logits :].to(self.reading.logits_dtype, copy=True)
            self.count(call, us)
        return logits
