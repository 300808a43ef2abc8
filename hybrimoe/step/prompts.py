"""Prompts of layers that keep states: the model's own projections, and between them one compiled call for some rows.

transformers' operators for many tokens are those of a GPU: chunks of tokens, as dozens of small products each, which on
a CPU take several times as long as going through the tokens does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from cpu_kernels.host.isa import detect
from cpu_kernels.step.compiled import CompiledStates, Workspace
from cpu_kernels.step.parts import StateLayer
from cpu_kernels.step.program import MAX_ROWS
from hybrimoe.step.forward import InPlaceOfForward
from hybrimoe.step.seats import Seat
from hybrimoe.step.states import States, begin_states, place_of_states, states_of
from hybrimoe.step.trace import Call

MOST_SEQUENCES = MAX_ROWS // 2
"""So that each has two tokens in a call at least."""


@dataclass(frozen=True, slots=True)
class PromptReading:
    """A layer with states: its seat, its description, the modules of its projections and of the last one, which
    arguments of its recorded call were there, and which of them is the cache."""

    seat: Seat
    core: StateLayer
    projections: tuple[nn.Module, ...]
    output: nn.Module
    given: frozenset[str]
    cache: int | str

    @classmethod
    def of(
        cls, call: Call, core: StateLayer, projections: tuple[nn.Module, ...], output: nn.Module, cache: Any
    ) -> PromptReading:
        """Of a recorded call. Raises NotCompiled where it returns more than its result."""
        named: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        given = frozenset(str(name) for name, value in named if value is not None)
        place = next(name for name, value in named if value is cache)
        return cls(Seat.of(call), core, projections, output, given, place)


class StatePrompts:
    """Answers calls of layers with states that the step does not serve, where several tokens are new."""

    def __init__(
        self, readings: list[PromptReading], like: Mapping[int, States], cache_type: type[DynamicCache], n_threads: int,
        usable: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._cache_type, self._like, self._usable = cache_type, like, usable
        self._lock = threading.Lock()
        self._workspace = Workspace()
        self._installed = []
        for reading in readings:
            states = CompiledStates(reading.core, n_threads, detect().isa.name, self._workspace)

            def answer(
                own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
                reading: PromptReading = reading, states: CompiledStates = states,
            ) -> Any:  # fmt: skip
                hidden = reading.seat.input(args, kwargs)
                held = self._held(reading, hidden, args, kwargs)
                if held is None:
                    return own(*args, **kwargs)
                with self._lock:
                    return reading.seat.output(hidden, computed(reading, states, hidden, held))

            self._installed.append(InPlaceOfForward(reading.seat.module, answer))

    def _held(
        self, reading: PromptReading, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> States | None:
        """The states of the call's cache; None where transformers must answer it."""
        if torch.is_grad_enabled() or hidden.dim() != 3 or hidden.shape[1] < 2 or hidden.device.type != "cpu":
            return None
        named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        cache = named.pop(reading.cache, None)
        if not isinstance(cache, DynamicCache) or type(cache) is not self._cache_type or cache.offloading:
            return None
        if len(hidden) > MOST_SEQUENCES or not self._usable():
            return None
        if any(not _is_known(reading, str(name), value) for name, value in named.items()):
            return None
        number = reading.core.cache
        if states_of(cache, number) is None:
            begin_states(cache, number, self._like[number], len(hidden))
        held = states_of(cache, number)
        return held if held is not None and held.are_like(self._like[number], len(hidden)) else None

    def undo(self) -> None:
        """Gives the modules their own forward back."""
        for installed in self._installed:
            installed.undo()
        self._installed = []


def _is_known(reading: PromptReading, name: str, value: Any) -> bool:
    """Whether an argument changes nothing: it is not there, it was in the recorded call, or it is a mask of nothing."""
    if isinstance(value, torch.Tensor) and "mask" in name:
        return bool(value.all())
    return value is None or value is False or name in reading.given


def computed(reading: PromptReading, states: CompiledStates, hidden: torch.Tensor, held: States) -> torch.Tensor:
    """What a layer gives for hidden states [B, n, width], n of each sequence behind those that `held` stands for."""
    n_sequences, n_new, _ = hidden.shape
    inputs: list[torch.Tensor] = []
    for module, source in zip(reading.projections, _sources(reading.core), strict=True):
        inputs.append(module(hidden if source is None else inputs[source]))
    for sequence in range(n_sequences):
        states.bind(sequence, place_of_states(held, held, sequence))
    floats = [one.float().numpy() for one in inputs]
    result = torch.empty(n_sequences, n_new, states.result.shape[1])
    rows, n_calls = result.numpy(), -(-n_new // (MAX_ROWS // n_sequences))
    for number in range(n_calls):
        first, stop = (n_new * at // n_calls for at in (number, number + 1))
        n_rows = n_sequences * (stop - first)
        for target, values in zip(states.inputs, floats, strict=True):
            target[:n_rows] = values[:, first:stop].reshape(n_rows, -1)
        states.run(n_sequences, stop - first)
        rows[:, first:stop] = states.result[:n_rows].reshape(n_sequences, stop - first, -1)
    output: torch.Tensor = reading.output(result.to(hidden.dtype))
    return output


def _sources(core: StateLayer) -> list[int | None]:
    """Of each projection, the number of that which it reads; None: the layer's input."""
    return [*[None] * len(core.inputs), *(number for number, _ in core.behind)]
