"""A captured step as it is launched: graphs of the device, and the calls of experts between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gpu_kernels.graphs import Graph
from hybrimoe.runtime.exchanged import ExchangedExperts
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.resident import ResidentExperts
from hybrimoe.runtime.token_loop.loop import Stop, TokenLoop
from hybrimoe.step.fixed_cache import CacheLayer, HeldLayer

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden states, expert ids and weights."""
InsideCall = tuple[int, Routed]
"""A layer of the session, and a call of its experts within a graph."""
Counts = npt.NDArray[np.float64]
Within = ResidentExperts | ExchangedExperts | None
"""What takes part in the graphs of a step: resident experts, which are computed there; those that host and device
split, whose calls begin and end there; None: each call of experts is between two pieces, as it is."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsPlace:
    """A call of experts between two pieces: always with the same memory. result: what the next piece reads. sent: what
    stands for all that where the piece before sends the call to the host."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: torch.Tensor | None = None
    sent: SentCall | None = None

    def give(self, output: torch.Tensor) -> None:
        """An output of the call, for the next piece."""
        if self.sent is not None:
            self.sent.exchange.put(output)
        elif self.result is not None:
            self.result.copy_(output)

    def run(self, session: Any) -> None:
        """Has the experts computed."""
        if self.sent is not None:
            session.run_sent(self.sent)
        else:
            self.give(self.module(*self.args, **self.kwargs))


class RunsTokens(Protocol):
    """`Session.run_token`."""

    def __call__(self, loop: TokenLoop, at: int, *, launched: bool) -> Stop | None: ...


@dataclass(frozen=True, slots=True)
class Answers:
    """What answers the calls of a step: `experts` each of them, and `settle` does what that leaves to do while the
    device computes the piece behind it; `run_token` several by a loop, None where each is to be answered by itself."""

    experts: Callable[[ExpertsPlace], None]
    settle: Callable[[], None]
    run_token: RunsTokens | None = None


@dataclass(slots=True, eq=False)
class Pieces:
    """A captured step of `n_sequences` sequences over one cache's buffers and states.

    numbers: int64 [2 * sequences + 1] on the device: token ids, their positions, tokens before them. held: of each
    layer of the cache. counts: of a step,
    by layer of the session: calls of experts within the graphs, active experts, us of the device for them. pool_bytes:
    of the device, for what the pieces compute with. n_replays: steps so far. loop: what runs the pieces and the calls
    between them without Python; no_loop: why there is none.
    """

    numbers: torch.Tensor
    held: list[HeldLayer]
    graphs: list[Graph] = field(default_factory=list)
    experts: list[ExpertsPlace] = field(default_factory=list)
    output: Any = None
    within: Within = None
    inside: list[InsideCall] = field(default_factory=list)
    counts: Counts = field(default_factory=lambda: np.zeros((0, 3)))
    pool_bytes: int = 0
    n_replays: int = 0
    loop: TokenLoop | None = None
    no_loop: str = "it sends no calls of experts to the host"
    busy_ns: int = 0
    """Of the latest step: for which the host was busy with the pieces, or waited for one."""

    def run(self, numbers: torch.Tensor, answers: Answers) -> torch.Tensor:
        """Launches the step. Returns the logits [sequences, 1, V], which the next step overwrites."""
        self.n_replays += 1
        start_ns = time.perf_counter_ns()
        self.numbers.copy_(numbers, non_blocking=True)
        self.busy_ns = time.perf_counter_ns() - start_ns
        at, launched = 0, False
        while True:
            stop, answered = self._by_loop(answers, at, launched), False
            if stop is not None:
                at, answered = stop
            elif not launched:
                self._launch(at, answers)
            if at == len(self.experts):
                break
            if not answered:
                self._answer(self.experts[at], answers)
            at, launched = at + 1, True
            self._launch(at, answers)
        logits: torch.Tensor = self.output.logits
        return logits

    def _by_loop(self, answers: Answers, at: int, launched: bool) -> Stop | None:
        """The places from `at` on, as far as the loop comes; None where it does not begin."""
        if self.loop is None or answers.run_token is None or at == len(self.experts):
            return None
        stop = answers.run_token(self.loop, at, launched=launched)
        self.busy_ns += 0 if stop is None else self.loop.pieces_ns
        return stop

    def _answer(self, place: ExpertsPlace, answers: Answers) -> None:
        """A call of experts whose piece was launched."""
        start_ns = time.perf_counter_ns()
        if place.sent is not None:
            place.sent.exchange.wait()
        self.busy_ns += time.perf_counter_ns() - start_ns
        answers.experts(place)

    def _launch(self, at: int, answers: Answers) -> None:
        """The piece before a call, or behind all of them; then what the call before it has left to do."""
        start_ns = time.perf_counter_ns()
        self.graphs[at].replay()
        self.busy_ns += time.perf_counter_ns() - start_ns
        answers.settle()

    def is_of(self, layers: Sequence[CacheLayer], n_sequences: int, within: Within) -> bool:
        """Whether these are the pieces for layers of a cache, and for experts, as they are now."""
        return (
            self.within is within
            and len(self.numbers) == 2 * n_sequences + 1
            and len(self.held) == len(layers)
            and all(held.is_of(layer) for held, layer in zip(self.held, layers, strict=True))
        )

    def was_of(self, layers: Sequence[CacheLayer]) -> bool:
        """Whether these were recorded for layers of a cache, in whichever memory they are now."""
        return len(self.held) == len(layers) and all(
            held.layer is layer for held, layer in zip(self.held, layers, strict=True)
        )

    def is_alive(self) -> bool:
        """Whether the cache is still there, in the same memory."""
        return all(held.is_there() for held in self.held)
