"""From an injected model to its compiled or captured step, or to the reasons why it has none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.errors import KernelError, LayoutError
from cpu_kernels.host.threads import torch_threads
from cpu_kernels.step.kv_rows import make_ready
from cpu_kernels.step.stored import KIND_OF
from gpu_kernels.graphs import RecordsGraphs, graphs_of
from gpu_kernels.step_kernels import StepKernels, load_step_kernels
from hybrimoe.compat import takes_dynamic_cache
from hybrimoe.errors import ConfigError
from hybrimoe.generation.growing import GrowingLayer, growing_cache
from hybrimoe.step.captured import CapturedStep
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.forward import InPlaceOfForward
from hybrimoe.step.mixed import MixedStep
from hybrimoe.step.model_step import ModelStep
from hybrimoe.step.read_model import Reading, read_model
from hybrimoe.step.served import ServedStep
from hybrimoe.step.step import Step
from hybrimoe.step.trace import CALL_ERRORS, SEED, record, without_earlier_images

TRIAL_TOKENS = 7
"""Of the step that a captured one is compared with; the last is computed in both ways."""


@dataclass(slots=True)
class StepWay:
    """How the decode steps of a model run. step: the compiled one (all of the model or pieces of it) or the captured
    one, None where transformers' forward runs them; reason: why then; layers: the way of each layer by its path, or of
    all of them as "model"."""

    step: ModelStep | None = None
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
    """Reads a started model, compares, compiles or captures, and puts the step before the model's forward."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    if devices:
        return _on_devices(model, session, devices)
    if not session.plain:
        return StepWay(reason="experts have slots on an accelerator, or a lossy policy runs")
    backend = session.layers[0].backend
    if not isinstance(backend, NumbaBackend):
        return StepWay(reason=f"the experts run on the backend {getattr(backend, 'name', '?')!r}, the step needs numba")
    was_training = model.training
    model.eval()
    try:
        with torch_threads(1):  # thousands of small operations, for which its pool only waits where cores are busy
            reading = read_model(record(model), session, backend.n_threads)
    except (NotCompiled, KernelError) as error:
        return StepWay(reason=str(error))
    except CALL_ERRORS as error:
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


def require_readable(model: nn.Module, way: StepWay, kv_dtype: str) -> None:
    """Compiles what reads keys and values that are stored as `kv_dtype`.

    Raises ConfigError, with the layer and the reason, where transformers' own forward would read them in a decode step,
    which would make floats of all of them for each token; and where there is nothing to store so.
    """
    asked = f"memory.kv_dtype: {kv_dtype}"
    if not takes_dynamic_cache(model):
        raise ConfigError(f"{asked}: the model makes a cache of its own kind; leave kv_dtype out")
    layers = growing_cache(model.config.get_text_config(decoder=True)).layers  # type: ignore[union-attr, operator]
    plain = [number for number, layer in enumerate(layers) if type(layer) is GrowingLayer]
    if not plain:
        raise ConfigError(
            f"{asked}: no layer of this model keeps keys and values of every token, and nothing else (windows and"
            " recurrent states stay as the model computes them); leave kv_dtype out"
        )
    programs = way.step.programs if isinstance(way.step, ServedStep) else []
    compiled = {number for program in programs for number in program.compiled.cache_layers}
    for number in plain:
        if number not in compiled:
            raise ConfigError(
                f"{asked}: it needs attention that is compiled on the CPU (--accelerator none), and layer {number} has"
                f" {_way_of_layer(way, number)}; leave kv_dtype out"
            )
    for program in programs:
        try:
            program.compiled.prepare(KIND_OF[kv_dtype], plain)
        except LayoutError as error:
            raise ConfigError(f"{asked}: {error}") from error
    make_ready()


def _way_of_layer(way: StepWay, number: int) -> str:
    ways = way.described()
    return next((told for path, told in ways.items() if path.endswith(f".{number}")), next(iter(ways.values())))


def _on_devices(model: nn.Module, session: Any, devices: set[torch.device]) -> StepWay:
    """The captured step of a model whose dense part lies on accelerators."""
    if len(devices) > 1:
        return StepWay(reason=f"its dense part is on {len(devices)} accelerators")
    (device,) = devices
    if any(parameter.device.type == "cpu" for parameter in model.parameters()):
        return StepWay(reason=f"its dense part is on {device} and on the CPU")
    graphs = graphs_of(device)
    if graphs is None:
        return StepWay(reason=f"torch records no graphs on {device}")
    kernels = load_step_kernels(device)
    way = capture_step(model, session, device, graphs, kernels)
    if way.step is None and kernels != StepKernels():
        with_torch = capture_step(model, session, device, graphs)
        if with_torch.step is not None:
            with_torch.layers["model"] += f"; attention and norms by torch: {way.reason}"
            return with_torch
    return way


def capture_step(
    model: nn.Module, session: Any, device: torch.device, graphs: RecordsGraphs, kernels: StepKernels | None = None
) -> StepWay:
    """Captures a step of a model on one device, compares it, and puts it before the model's forward. kernels: for what
    of it they can compute."""
    if not takes_dynamic_cache(model):
        return StepWay(reason="the model makes a cache of its own kind")
    was_training = model.training
    model.eval()
    try:
        step = CapturedStep(model, session, device, graphs, kernels)
        generator = torch.Generator().manual_seed(SEED)
        tokens = torch.randint(0, step.text_config.vocab_size, (TRIAL_TOKENS,), generator=generator)
        with without_earlier_images(model):
            n_calls = step.try_out(tokens.tolist())
    except NotCompiled as error:
        return StepWay(reason=str(error))
    except Exception as error:  # noqa: BLE001 - drivers and compilers of other projects: no common root
        return StepWay(reason=f"its step cannot be captured: {type(error).__name__}: {_first_line(error)}")
    finally:
        model.train(was_training)
        session.forget_trial()
    session.add_reporter(step.report)
    way = f"captured: {n_calls + 1} pieces, each a graph of {device}, around {n_calls} calls of experts"
    if n_calls:
        way = f"{way}, {step.how_experts_are_called()}"
    return StepWay(step, None, {"model": way}, InPlaceOfForward(model, step.answer))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _ways(reading: Reading) -> dict[str, str]:
    """By layer: "compiled", the reason why transformers runs it, or both where it is mixed."""
    ways = dict.fromkeys(reading.layers, "compiled")
    for path, reason in reading.reasons.items():
        blocks = ", ".join(reading.blocks.get(path, []))
        ways[path] = f"{blocks} compiled; the rest by transformers: {reason}" if blocks else f"transformers: {reason}"
    return ways
