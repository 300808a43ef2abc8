"""The compiled step of a model: stands before its forward and answers the calls that it can serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache

from cpu_kernels.host.isa import detect
from cpu_kernels.host.threads import torch_threads
from cpu_kernels.step.compiled import CompiledStep
from cpu_kernels.step.program import MAX_ROWS, Part
from hybrimoe.errors import ModelError
from hybrimoe.generation.growing import GrowingLayer, grow_in_place
from hybrimoe.step.angles import Angles
from hybrimoe.step.as_read import AsRead
from hybrimoe.step.caches import KINDS, place_of
from hybrimoe.step.calls import StepCall, read_call
from hybrimoe.step.read_model import Reading
from scheduler import Phase

PHASES: tuple[Phase, ...] = ("prefill", "decode")
HARMLESS = ("transformers.utils.output_capturing", "hybrimoe.generation.module_parts")
"""Modules whose hooks do nothing in a step: transformers leaves its own in a model once it was asked for hidden states
or router logits; those of a profile time modules that are called."""


class Step:
    """One model's compiled step. Calls queue; what it cannot serve it leaves to transformers, call by call.

    The KV cache is the caller's own, in the layers of `hybrimoe.generation.growing`, so the two ways can alternate.
    """

    def __init__(self, model: nn.Module, session: Any, reading: Reading, n_threads: int) -> None:
        if reading.model is None or reading.ropes is None:
            raise ModelError(f"this model has no compiled step: {reading.reason}")
        self.model = model
        self.session = session
        self._reading = reading
        self._compiled = CompiledStep(reading.model, n_threads, detect().isa.name)
        self._angles = [Angles(source, doubled) for source, doubled in reading.ropes.sources]
        self._bound: list[Any] = [None] * len(self._compiled.cache_layers)
        self._lock = threading.Lock()
        self._hooks = [
            hooks for module in model.modules() if module is not model
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]  # fmt: skip
        self._embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        self._as_read = AsRead(model)
        self.n_steps = 0
        self.step_us = 0.0
        self._counted: dict[Phase, list[float]] = {phase: [0, 0, 0.0] for phase in PHASES}  # calls, tokens, us
        self._experts_seen: dict[int, int] = {}

    # Serving ----------------------------------------------------------------------------------------------------

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output for a call of its forward; None where transformers must answer."""
        if torch.is_grad_enabled() or not self._usable():
            return None
        call = read_call(self.model.config, args, kwargs)
        if call is None or not self._fits(call.cache, call.n_sequences):
            return None
        logits = self._logits(call)
        assert self._reading.output_type is not None
        return self._reading.output_type(logits=logits, past_key_values=call.cache)

    def next_logits(self, token_ids: Sequence[int], cache: Any, *, drafted: bool = False) -> torch.Tensor | None:
        """Logits [1, V] after new tokens of one sequence; None where the model's forward must be called.

        The short way of `serve` for callers that hold plain numbers and a cache. drafted: the tokens after the first
        are guesses about the next decode steps, and the logits are those after each of the n tokens, [n, V].
        """
        if len(token_ids) > MAX_ROWS or type(cache) is not DynamicCache or not self._usable():
            return None
        n_past = cache.get_seq_length()
        if not n_past or not self._fits(cache, 1):
            return None
        n_new = len(token_ids)
        positions = list(range(n_past, n_past + n_new))
        phase: Phase = "decode" if drafted or n_new == 1 else "prefill"
        call = StepCall(list(token_ids), 1, n_new, n_past, cache, positions, None, n_new if drafted else 1, phase)
        with torch.inference_mode():
            return self._logits(call)[0]

    @property
    def differs_in_batches(self) -> str | None:
        """Why several tokens in one step may not get the bits that they get one by one; None where they do."""
        if any(angles.changes for angles in self._angles):
            return "the angles of the model's rotary embedding depend on the longest position of a step"
        return None

    def _usable(self) -> bool:
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

    def _fits(self, cache: DynamicCache, n_sequences: int) -> bool:
        """Whether the layers of the cache are such as the step reads; plain ones are given room to grow."""
        layers = cache.layers
        if len(layers) < len(self._compiled.cache_layers):
            return False
        if any(not isinstance(layer, GrowingLayer) for layer in layers):
            grow_in_place(cache)
        n_past = cache.get_seq_length()
        for layer in layers:
            if not isinstance(layer, GrowingLayer) or not layer.is_initialized or layer.get_seq_length() != n_past:
                return False
            if getattr(layer, "record_past", False) or layer.dtype not in KINDS or layer.device.type != "cpu":
                return False
            if layer.n_sequences != n_sequences:
                return False
        return True

    def _logits(self, call: StepCall) -> torch.Tensor:
        """Runs the step; logits [sequences, kept, V] in the dtype that the model itself gives."""
        if min(call.token_ids) < 0 or max(call.token_ids) >= self._embedding.shape[0]:
            raise IndexError(f"token ids must be below {self._embedding.shape[0]}, found {call.token_ids}")
        with self._lock, torch_threads(1):  # more would spin on after the copy of the logits
            compiled = self._compiled
            self._bind(call)
            compiled.set_rows(call.n_sequences, call.n_new, call.n_past, call.token_ids)
            compiled.set_mask(call.mask)
            for angles, (cos, sin) in zip(self._angles, compiled.angles, strict=True):
                angles.write(call.positions, cos, sin)
            began = time.perf_counter()
            compiled.run()
            us = (time.perf_counter() - began) * 1e6
            for layer in call.cache.layers:
                layer.advance(call.n_new)
            n_rows = call.n_sequences * call.n_new
            rows = torch.from_numpy(compiled.logits[:n_rows]).view(call.n_sequences, call.n_new, -1)
            logits = rows[:, call.n_new - call.n_logits :].to(self._reading.logits_dtype, copy=True)
            self._count(call, us)
        return logits

    def _bind(self, call: StepCall) -> None:
        """Lets the program find the cache: anew only where a layer has other buffers than in the step before."""
        compiled, layers = self._compiled, call.cache.layers
        for number, layer in enumerate(compiled.cache_layers):
            buffers = layers[layer].grown(call.n_new)
            if buffers is not self._bound[number]:
                compiled.bind(number, place_of(buffers))
                self._bound[number] = buffers
        compiled.give_room(call.n_past + call.n_new)

    # Counting ---------------------------------------------------------------------------------------------------

    def _count(self, call: StepCall, us: float) -> None:
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
        with self._lock:
            activated, shares = self._compiled.experts_activated, self._shares()
            tokens = sum(counted[1] for counted in self._counted.values())
            for phase, (calls, n_tokens, us) in self._counted.items():
                if not calls:
                    continue
                for number, total in activated.items():
                    layer = self._reading.session_layers[number]
                    n_experts = round((total - self._experts_seen.get(number, 0)) * n_tokens / tokens)
                    experts_us = us * shares[Part.EXPERTS] / len(activated)
                    stats.of(phase, layer).ran_on_cpu_often(int(calls), int(n_tokens), n_experts, experts_us)
            self._experts_seen = activated
            self._counted = {phase: [0, 0, 0.0] for phase in PHASES}

    def _shares(self) -> dict[Part, float]:
        ticks = self._compiled.ticks
        total = sum(ticks.values()) or 1
        return {part: value / total for part, value in ticks.items()}

    def meter(self) -> tuple[dict[str, int], float]:
        """Clock ticks of all steps so far by part, in the thread that called, and their us: two readings say what was
        between them. (Shares of all ticks do not: the first step has little but its start in its us.)"""
        with self._lock:
            return {part.name.lower(): ticks for part, ticks in self._compiled.ticks.items()}, self.step_us


class StepForward:
    """Stands as `forward` on a model: the step's answer, or the model's own where there is none."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        self._own = model.forward
        self._step = step
        update_wrapper(self, self._own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        served = self._step.serve(args, kwargs)
        return self._own(*args, **kwargs) if served is None else served

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model has weights of its own, which this step does not read: it gets its own forward."""
        copied = memo.get(id(self._step.model))
        return self if copied is None else MethodType(type(copied).forward, copied)


class StepBeforeForward:
    """Puts a step before a model's forward, and takes it away again."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        self._model = model
        self._before = model.__dict__.get("forward")
        self._forward = StepForward(model, step)
        model.__dict__["forward"] = self._forward

    def undo(self) -> None:
        """Gives the model its forward back. Does nothing where somebody else has put another one in its place."""
        if self._model.__dict__.get("forward") is not self._forward:
            return
        if self._before is None or getattr(self._before, "__func__", None) is type(self._model).forward:
            del self._model.__dict__["forward"]
        else:
            self._model.__dict__["forward"] = self._before
