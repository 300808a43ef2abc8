"""A step that mixes both ways: the model's own forward runs, with compiled pieces in the place of what is understood.

A piece is a run of decoder layers, or one block (attention, experts, MLP) of a layer that is not understood as a whole,
such as one with several streams beside each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from cpu_kernels.host.isa import detect
from cpu_kernels.step.compiled import CompiledLayers, Workspace
from hybrimoe.step.caches import BoundLayers
from hybrimoe.step.calls import StepCall
from hybrimoe.step.forward import InPlaceOfForward
from hybrimoe.step.read_model import PieceReading, Reading
from hybrimoe.step.seats import Seat
from hybrimoe.step.served import ServedStep


class _Served(threading.local):
    """The call of the model that a thread is in, where the step serves it, and what its pieces took so far."""

    call: StepCall | None = None
    us: float = 0.0


class MixedStep(ServedStep):
    """Answers a call by the model's own forward, in which pieces are compiled."""

    def __init__(self, model: nn.Module, session: Any, reading: Reading, n_threads: int) -> None:
        super().__init__(model, session, reading)
        self.answer_prompts(n_threads)
        self._now = _Served()
        self._installed: list[InPlaceOfForward] = []
        self._workspace = Workspace()
        self._untimed: list[BoundLayers] = []
        self._untimed_us = 0.0
        for piece in reading.pieces:
            self._install(piece, n_threads)

    def _install(self, piece: PieceReading, n_threads: int) -> None:
        assert self.reading.ropes is not None
        first, *others = piece.seats
        width, sizes = piece.width, tuple(self.reading.ropes.sizes)
        compiled = CompiledLayers(piece.layers, width, sizes, n_threads, detect().isa.name, self._workspace)
        bound = BoundLayers(compiled, self.angles)
        self.programs.append(bound)
        self.states |= {layer: self.reading.states[layer] for layer in compiled.state_layers}
        if not piece.is_block or piece.has_experts:
            self._untimed.append(bound)
        self._installed.append(InPlaceOfForward(first.module, partial(self._run, bound, first)))
        self._installed += [InPlaceOfForward(seat.module, partial(self._pass, seat)) for seat in others]

    def answer(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the model's own forward, whose pieces are compiled where the call can be served."""
        call = self.served_call(args, kwargs)
        if call is None or self._now.call is not None:
            return own(*args, **kwargs)
        self._now.call, self._now.us = call, 0.0
        try:
            output = own(*args, **kwargs)
        finally:
            self._now.call = None
        with self.lock:
            self.count(call, self._now.us)
        return output

    def _run(
        self, bound: BoundLayers, seat: Seat, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the first module of a piece gives: the piece's result."""
        call = self._now.call
        if call is None:
            return own(*args, **kwargs)
        hidden = seat.input(args, kwargs)
        with self.lock:
            rows = bound.compiled.stream[: call.n_sequences * call.n_new]
            rows[:] = hidden.reshape(rows.shape).float().numpy()
            us = bound.run(call)
            self._now.us += us
            self._untimed_us += us if bound in self._untimed else 0.0
            result = torch.from_numpy(rows).to(hidden.dtype, copy=True)
        return seat.output(hidden, result)

    def _pass(self, seat: Seat, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the other modules of a piece give: their input, which is the piece's result already."""
        if self._now.call is None:
            return own(*args, **kwargs)
        hidden = seat.input(args, kwargs)
        return seat.output(hidden, hidden)

    def _metered(self) -> tuple[list[BoundLayers], float]:
        """Runs of layers and blocks of experts; blocks of attention and MLPs are parts of the model by themselves."""
        return self._untimed, self._untimed_us

    def undo(self) -> None:
        """Gives all modules their own forward back."""
        for installed in self._installed:
            installed.undo()
        self._installed = []
        super().undo()
