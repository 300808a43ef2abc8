"""From an injected model to its compiled step, or to the reasons why it has none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.errors import KernelError
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.forward import InPlaceOfForward
from hybrimoe.step.mixed import MixedStep
from hybrimoe.step.read_model import Reading, read_model
from hybrimoe.step.served import ServedStep
from hybrimoe.step.step import Step
from hybrimoe.step.trace import record

TRIAL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError)
"""What a model that wants more than tokens may raise in its trial run: it then keeps its own way."""


@dataclass(slots=True)
class StepWay:
    """How the decode steps of a model run. step: the compiled one (all of the model or pieces of it), None where
    transformers' forward runs them; reason: why then; layers: the way of each layer by its path."""

    step: ServedStep | None = None
    reason: str | None = None
    layers: dict[str, str] = field(default_factory=dict)
    _installed: InPlaceOfForward | None = None

    def described(self) -> dict[str, str]:
        """The way of each layer; "model" stands for all where none was read."""
        return self.layers or {"model": f"transformers: {self.reason}"}

    def of_copy(self) -> StepWay:
        """The way of a copy of the model: a step reads weights where they lie, and those of a copy lie elsewhere."""
        if self.step is None:
            return StepWay(None, self.reason, dict(self.layers))
        return StepWay(reason="a copy of a model: Injection.compile_step() gives it a step of its own")

    def undo(self) -> None:
        """Gives the model its own forward back."""
        if self._installed is not None:
            self._installed.undo()
            self._installed = None
        if self.step is not None:
            self.step.undo()
            self.step.session.remove_reporter(self.step.report)
            self.step = None


def compile_step(model: nn.Module, session: Any) -> StepWay:
    """Reads a started model, compares, compiles, and puts the step before the model's forward."""
    if not session.plain:
        return StepWay(reason="experts have slots on an accelerator, or a lossy policy runs")
    backend = session.layers[0].backend
    if not isinstance(backend, NumbaBackend):
        return StepWay(reason=f"the experts run on the backend {getattr(backend, 'name', '?')!r}, the step needs numba")
    if any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters()):
        return StepWay(reason="the dense part of the model is on an accelerator")
    if any(hasattr(module, "rope_deltas") for module in model.modules()):
        return StepWay(reason="the positions of its tokens depend on the images before them")
    was_training = model.training
    model.eval()
    try:
        reading = read_model(record(model), session, backend.n_threads)
    except (NotCompiled, KernelError) as error:
        return StepWay(reason=str(error))
    except TRIAL_ERRORS as error:
        return StepWay(reason=f"its recorded step failed: {type(error).__name__}: {error}")
    finally:
        model.train(was_training)
        session.forget_trial()
    layers = _ways(reading)
    if reading.model is None and not reading.pieces:
        return StepWay(reason=reading.reason, layers=layers)
    step = (MixedStep if reading.model is None else Step)(model, session, reading, backend.n_threads)
    session.add_reporter(step.report)
    return StepWay(step, None, layers, InPlaceOfForward(model, step.answer))


def _ways(reading: Reading) -> dict[str, str]:
    """By layer: "compiled", the reason why transformers runs it, or both where it is mixed."""
    ways = dict.fromkeys(reading.layers, "compiled")
    for path, reason in reading.reasons.items():
        blocks = ", ".join(reading.blocks.get(path, []))
        ways[path] = f"{blocks} compiled; the rest by transformers: {reason}" if blocks else f"transformers: {reason}"
    return ways
