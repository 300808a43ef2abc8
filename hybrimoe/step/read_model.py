"""A whole model: its layers read and each compared with the original, then what comes before and after them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from cpu_kernels.step.floats import BFLOAT16, FLOAT32
from cpu_kernels.step.parts import Branch, Head, LatentAttention, Layer, Model, Moe, StateLayer
from cpu_kernels.step.stream import Embedding
from hybrimoe.experts.module import HybridExperts
from hybrimoe.generation.growing import GrowingLayer
from hybrimoe.step.caches import NoRows, no_rows_of
from hybrimoe.step.compare import Comparison, is_exact
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.prompts import PromptReading
from hybrimoe.step.reading.attention import RopeTables
from hybrimoe.step.reading.layer import Site, branches_of, sites_of, whole_site
from hybrimoe.step.reading.parts import read_linear, read_norm
from hybrimoe.step.reading.states import read_prompts
from hybrimoe.step.seats import Seat
from hybrimoe.step.states import States
from hybrimoe.step.trace import PROMPT_TOKENS, Call, Trace, same

CAP_TOLERANCE = 1e-2
"""Relative, of logits that are kept below a cap: of bfloat16."""


@dataclass(frozen=True, slots=True)
class PieceReading:
    """What one compiled call of a mixed step does: `layers` (with their numbers) in the place of modules.

    is_block: in the place of one block of a layer.
    """

    seats: tuple[Seat, ...]
    layers: tuple[tuple[int, Layer], ...]
    width: int
    is_block: bool

    @property
    def has_experts(self) -> bool:
        """Whether experts are in it."""
        return any(
            isinstance(core, Moe) for _, layer in self.layers for branch in layer.branches for core in branch.cores
        )


@dataclass(slots=True)
class Reading:
    """What was read of a model. reasons: by layer path, why it is not compiled; `model` is None unless all are; then
    `pieces` are what can be compiled all the same. blocks: by layer path, the compiled ones of layers that are not.
    session_layers: of the layers with experts, their number in the session. no_rows: by number of the cache layer, the
    keys and values of no token; states: of the cache layers that keep states, what they are like."""

    layers: dict[str, Layer] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    model: Model | None = None
    pieces: list[PieceReading] = field(default_factory=list)
    blocks: dict[str, list[str]] = field(default_factory=dict)
    ropes: RopeTables | None = None
    output_type: type | None = None
    cache_type: type = DynamicCache
    logits_dtype: torch.dtype = torch.float32
    session_layers: dict[int, int] = field(default_factory=dict)
    no_rows: dict[int, NoRows] = field(default_factory=dict)
    states: dict[int, States] = field(default_factory=dict)
    prompts: list[PromptReading] = field(default_factory=list)
    """Of the layers with states whose prompts are computed in part by compiled calls."""

    @property
    def reason(self) -> str | None:
        """Why the model as a whole is not compiled: the first reason."""
        return next((f"{path}: {reason}" for path, reason in self.reasons.items()), None)


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of the decoder layers: the list of modules in which the experts are. Raises NotCompiled without one."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not isinstance(module, HybridExperts):
            continue
        while path:
            path, _, name = path.rpartition(".")
            if isinstance(modules[path], nn.ModuleList) and name.isdigit():
                return [f"{path}.{index}" for index in range(len(modules[path]))]
    raise NotCompiled("the layers of the model are not a list of modules with experts inside")


def read_model(trace: Trace, session: Any, n_threads: int) -> Reading:
    """Reads every layer and compares it; what does not agree has its reason in the result."""
    reader = _Reader(trace, session, n_threads)
    reading = Reading(
        ropes=reader.ropes, output_type=type(trace.output), cache_type=type(trace.cache),
        logits_dtype=trace.output.logits.dtype, no_rows=_no_rows(trace.cache),
        states={number: states.on_meta() for number, states in trace.states.items()},
    )  # fmt: skip
    paths = layer_paths(trace.model)
    for number, path in enumerate(paths):
        experts = [call.module for call in trace.within(path) if isinstance(call.module, HybridExperts)]
        for module in experts:
            reading.session_layers[number] = module.layer
        try:
            reading.layers[path] = Layer(tuple(reader.branch(site, number) for site in sites_of(trace, trace.of(path))))
        except NotCompiled as error:
            reading.reasons[path] = str(error)
    if not reading.reasons:
        try:
            reading.model = _whole(trace, paths, reading)
        except NotCompiled as error:
            reading.reasons["around the layers"] = str(error)
    if reading.model is None:
        reader.find_pieces(reading, paths)
    reading.prompts = list(reader.prompts.values())
    return reading


def _no_rows(cache: DynamicCache) -> dict[int, NoRows]:
    layers = [(number, layer) for number, layer in enumerate(cache.layers) if isinstance(layer, GrowingLayer)]
    return {number: no_rows_of(layer) for number, layer in layers if layer.is_initialized}


@dataclass(slots=True)
class _Reader:
    """Reads parts of a recorded model and compares each with the original."""

    trace: Trace
    session: Any
    n_threads: int
    ropes: RopeTables = field(init=False)
    comparison: Comparison = field(init=False)
    prompts: dict[str, PromptReading] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ropes = RopeTables(self.trace)
        self.comparison = Comparison(self.trace, self.ropes, is_exact(self.trace, self.session), self.n_threads)

    def branch(self, site: Site, number: int) -> Branch:
        """The first form of a branch that agrees. Raises NotCompiled where none does.

        Several cores have each found their own form before.
        """
        error = float("inf")
        if len(site.cores) == 1:
            forms = branches_of(self.trace, site, self.ropes, self.session)
        else:
            forms = iter([site.branch(*(self.branch(core.alone(), number).core for core in site.cores))])
        for branch in forms:
            found = self.comparison.error(site, branch, number)
            if found <= 1:
                if len(site.cores) == 1 and isinstance(branch.core, StateLayer):
                    self._add_prompts(site.cores[0].call, branch.core)
                return replace(branch, takes=site.taken is not None)
            error = min(error, found)
        raise NotCompiled(f"{site.path}: its compiled form differs from the original ({error:.3g} x allowed)")

    def _add_prompts(self, call: Call, core: StateLayer) -> None:
        """Keeps how prompts of a layer with states are computed, where that agrees."""
        try:
            found = read_prompts(self.trace, call, core)
        except NotCompiled:
            return
        if self.comparison.prompts_error(call, found) <= 1:
            self.prompts[call.path] = found

    def find_pieces(self, reading: Reading, paths: list[str]) -> None:
        """Runs of layers that were understood, and blocks of the others."""
        run: list[tuple[int, Call]] = []
        for number, path in enumerate(paths):
            calls = [call for call in self.trace.calls if call.path == path]
            if path in reading.layers and _stands_alone(reading.layers[path]) and _returns_its_result(calls[0]):
                if run and not same(run[-1][1].result, calls[0].input):
                    self._add_run(reading, run)
                run.append((number, calls[0]))
                continue
            self._add_run(reading, run)
            if len(calls) == 1:
                self._add_blocks(reading, number, calls[0])
        self._add_run(reading, run)

    def _add_run(self, reading: Reading, run: list[tuple[int, Call]]) -> None:
        """Adds the layers of a run as one piece, and empties it."""
        if run:
            seats = tuple(Seat.of(call) for _, call in run)
            layers = tuple((number, reading.layers[call.path]) for number, call in run)
            reading.pieces.append(PieceReading(seats, layers, run[0][1].input.shape[-1], is_block=False))
            run.clear()

    def _add_blocks(self, reading: Reading, number: int, layer: Call) -> None:
        for block in self.trace.children(layer.path):
            if read_norm(block.module, block.input.shape[-1]) is not None:
                continue
            try:
                seat = Seat.of(block)
                branch = self.branch(whole_site(block), number)
            except NotCompiled:
                continue
            if not _stands_alone(Layer((branch,))):
                continue
            piece = PieceReading((seat,), ((number, Layer((branch,))),), block.input.shape[-1], is_block=True)
            reading.pieces.append(piece)
            reading.blocks.setdefault(layer.path, []).append(block.path.removeprefix(f"{layer.path}."))


def _stands_alone(layer: Layer) -> bool:
    """Whether no branch attends to tokens that another layer's index chooses: the forward of transformers may have
    computed that one."""
    cores = [core for branch in layer.branches for core in branch.cores]
    return not any(isinstance(core, LatentAttention) and core.top_k and core.index is None for core in cores)


def _returns_its_result(call: Call) -> bool:
    try:
        Seat.of(call)
    except NotCompiled:
        return False
    return True


def _whole(trace: Trace, paths: list[str], reading: Reading) -> Model:
    """Embedding, layers and output layer. Raises NotCompiled where something else stands between them."""
    model: Any = trace.model
    calls = [trace.of(path) for path in paths]
    for one, other in pairwise(calls):
        if not same(one.result, other.input):
            raise NotCompiled(f"something happens between {one.path} and {other.path}")
    assert reading.ropes is not None
    return Model(
        _embedding(trace, model, calls[0]), tuple(reading.layers[path] for path in paths),
        _head(trace, model, calls[-1]), tuple(reading.ropes.sizes),
    )  # fmt: skip


def _embedding(trace: Trace, model: Any, first: Call) -> Embedding:
    module = model.get_input_embeddings()
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding) or weight is None or weight.dtype not in (torch.float32, torch.bfloat16):
        raise NotCompiled(f"the embedding is {type(module).__name__}, expected rows of float32 or bfloat16")
    rows = weight.detach()[trace.token_ids[0, PROMPT_TOKENS:]].double().flatten()
    stream = first.input.double().flatten()
    scale = _factor(rows, stream, "the first layer's input is not the embedding of its tokens")
    kind = BFLOAT16 if weight.dtype == torch.bfloat16 else FLOAT32
    return Embedding(weight.data_ptr(), weight.shape[0], weight.shape[1], kind, scale)


def _head(trace: Trace, model: Any, last: Call) -> Head:
    output = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is output), None)
    if output is None or path is None:
        raise NotCompiled("the model has no output layer")
    call = trace.of(path)
    for norm_call in trace.calls:
        if same(norm_call.input, last.result) and norm_call.number > last.number:
            norm = read_norm(norm_call.module, last.result.shape[-1])
            if norm is not None and same(norm_call.result, call.input):
                scale, cap = _end(model, call.result.double().flatten(), trace.output.logits.double().flatten())
                return Head(norm, read_linear(output, path), scale, cap)
    raise NotCompiled("between the last layer and the output layer stands more than a norm")


def _end(model: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """(factor, cap) of the logits y behind the output layer, whose results x are large (`trace.record`); cap 0: none.

    Raises NotCompiled where they are neither multiplied nor bounded by a number of the configuration.
    """
    problem = "the logits are not those of the output layer"
    if x.shape != y.shape:
        raise NotCompiled(problem)
    config = model.config.get_text_config(decoder=True)
    caps = [value for value in vars(config).values() if isinstance(value, float) and value > 0]
    off = {cap: float((cap * (x / cap).tanh() - y).norm() / y.norm()) for cap in caps}
    best = min(off, key=lambda cap: off[cap], default=0.0)
    plain = float((x * (x @ y / (x @ x)) - y).norm() / y.norm())
    if off and off[best] <= CAP_TOLERANCE and off[best] < plain / 2:
        return 1.0, best
    return _factor(x, y, problem), 0.0


def _factor(x: torch.Tensor, y: torch.Tensor, problem: str) -> float:
    """s of y = s * x. Raises NotCompiled where there is none."""
    if x.shape != y.shape:
        raise NotCompiled(problem)
    factor = float(x @ y / (x @ x + 1e-300))
    if float((y - factor * x).norm() / (y.norm() + 1e-300)) > 1e-2:
        raise NotCompiled(problem)
    return 1.0 if abs(factor - 1) < 1e-3 else factor
