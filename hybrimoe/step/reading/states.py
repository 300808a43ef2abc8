"""Layers that keep states: linear attention, Mamba 2 and convolutions, found by their projections, tensors and states.

Where a projection's columns go is told by its width, by which projection's result a module is given, and in the end by
the comparison with the recorded step, of results and states.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from cpu_kernels.step.parts import HeadColumns, Recurrence, Segment, StateLayer
from cpu_kernels.step.states.gated_norm import GatedNorm
from cpu_kernels.step.states.recurrence import (
    BY_SIGMOID,
    BY_SOFTPLUS,
    DELTA,
    NO_LIMIT,
    SCAN,
    STEADY,
    SUM,
    Fading,
    Heads,
)
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.prompts import PromptReading
from hybrimoe.step.reading.parts import LINEARS, NORM_TOLERANCE, SAMPLES, array, read_linear, read_norm
from hybrimoe.step.states import States
from hybrimoe.step.trace import Call, Trace, same

L2_EPS = 1e-6
"""Of the norm of queries and keys, a constant of transformers' gated delta rules."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What is inside a call: projections of the block's input (`first`) and of those (`behind`), the output projection,
    norms of its results, the convolution's weight [channels, taps] and bias, and the states before the step."""

    call: Call
    cache: int
    states: States
    first: list[Call]
    behind: list[tuple[int, Call]]
    output: Call
    norms: list[Call]
    weight: np.ndarray | None
    bias: np.ndarray | None

    @property
    def widths(self) -> list[int]:
        """Columns of each projection."""
        return [inner.module.out_features for inner in self.projections]  # type: ignore[misc]

    @property
    def projections(self) -> list[Call]:
        """All but the last."""
        return [*self.first, *(inner for _, inner in self.behind)]

    def refused(self, reason: str) -> NotCompiled:
        """The error for a layer that is otherwise than expected."""
        return NotCompiled(f"{self.call.path} ({type(self.call.module).__name__}) keeps a state: {reason}")

    def layer(self, segments: tuple[Segment, ...], **parts: Any) -> StateLayer:
        """The description, with what is always the same."""
        inputs = tuple(read_linear(inner.module, inner.path) for inner in self.first)
        behind = tuple((number, read_linear(inner.module, inner.path)) for number, inner in self.behind)
        output = read_linear(self.output.module, self.output.path)
        return StateLayer(
            inputs, segments, output, self.cache, behind=behind, weight=self.weight, bias=self.bias, **parts
        )  # fmt: skip


def read_state_layer(trace: Trace, call: Call, cache: int) -> Iterator[StateLayer]:
    """The forms that a layer with states may have; which one it is, the comparison tells.

    Raises NotCompiled where it is none that the step knows.
    """
    found = _parts(trace, call, cache)
    if found.states.matrices is None:
        yield from _short_convolution(found)
    elif found.weight is None:
        yield from _lightning(found)
    elif any(path.rpartition(".")[2] == "D" for path, _ in call.module.named_parameters()):
        yield _scan(found)
    else:
        yield from _delta(found)


def read_prompts(trace: Trace, call: Call, core: StateLayer) -> PromptReading:
    """How prompts of a layer that was read as `core` are computed. Raises NotCompiled where it returns more than its
    result."""
    found = _parts(trace, call, core.cache)
    projections = tuple(inner.module for inner in found.projections)
    return PromptReading.of(call, core, projections, found.output.module, trace.cache)


def _parts(trace: Trace, call: Call, cache: int) -> _Found:
    inside = list(trace.within(call.path))
    linears = [inner for inner in inside if isinstance(inner.module, LINEARS)]
    name = f"{call.path} ({type(call.module).__name__}) keeps a state"
    if len(linears) < 2 or not same(linears[-1].result, call.result):
        raise NotCompiled(f"{name}: no last linear layer gives its result")
    *rest, output = linears
    first = [inner for inner in rest if same(inner.input, call.input)]
    behind = []
    for inner in rest:
        if inner not in first:
            read = next((number for number, made in enumerate(first) if same(made.result, inner.input)), None)
            if read is None:
                raise NotCompiled(f"{name}: {inner.path} reads what no projection of its input gives")
            behind.append((read, inner))
    norms = [inner for inner in inside if inner not in linears and list(inner.module.named_parameters())]
    norms = [inner for inner in norms if not any(True for _ in inner.module.children())]
    convolutions = [module for module in call.module.modules() if isinstance(module, nn.Conv1d)]
    if len(convolutions) > 1:
        raise NotCompiled(f"{name}: it has {len(convolutions)} convolutions")
    weight = bias = None
    if convolutions:
        weight, bias = _convolution(name, convolutions[0])
    return _Found(call, cache, trace.states[cache], first, behind, output, norms, weight, bias)


def _convolution(name: str, module: nn.Conv1d) -> tuple[np.ndarray, np.ndarray | None]:
    """Weights [channels, taps] and bias of a convolution of each channel over time."""
    if module.groups != module.in_channels or module.in_channels != module.out_channels or module.stride != (1,):
        raise NotCompiled(f"{name}: its convolution is not of each channel by itself")
    return array(module.weight)[:, 0], None if module.bias is None else array(module.bias)


# Convolutions, lightning attention, Mamba 2 ---------------------------------------------------------------------------


def _short_convolution(found: _Found) -> Iterator[StateLayer]:
    """A convolution alone, of two thirds of a projection multiplied with each other, then times the last third."""
    weight = found.weight
    if weight is None or found.widths != [3 * len(weight)]:
        raise found.refused(f"its projections give {found.widths} columns beside its convolution")
    n = len(weight)
    for after in (1, 0, 2):
        one, other = (HeadColumns(0, (n * third,)) for third in range(3) if third != after)
        yield found.layer((Segment(other, n, before=one, after=HeadColumns(0, (n * after,))),))


def _lightning(found: _Found) -> Iterator[StateLayer]:
    """Linear attention whose heads fade at a steady rate, with a norm over all of them and then a gate."""
    assert found.states.matrices is not None
    _, n, k_dim, v_dim = found.states.matrices.shape
    width = 2 * k_dim + v_dim
    if found.widths != [n * width, n * v_dim] or len(found.norms) != 1:
        raise found.refused(f"its projections give {found.widths} columns, and it has {len(found.norms)} norms")
    plain = read_norm(found.norms[0].module, n * v_dim)
    if plain is None or plain.centred or plain.bias is not None:
        raise found.refused(f"{found.norms[0].path} is no plain norm over all heads")
    fading = Fading(STEADY, np.exp(-_tensor(found, "slope_rate", n)))
    heads = Heads(n, n, k_dim, v_dim, 0, n * k_dim, 2 * n * k_dim)
    norm = GatedNorm(plain.weight, plain.eps, n * v_dim, has_sigmoid=True)
    grouped = [HeadColumns(0, tuple(width * head + first for head in range(n))) for first in (0, k_dim, 2 * k_dim)]
    for q, k, v in (grouped, [_row(0, *part) for part in _joined(heads)]):
        segments = (Segment(q, k_dim), Segment(k, k_dim), Segment(v, v_dim))
        yield found.layer(
            segments, has_silu=True, recurrence=Recurrence(SUM, heads, fading), norm=norm, gate=HeadColumns(1, (0,))
        )  # fmt: skip


def _scan(found: _Found) -> StateLayer:
    """Mamba 2: one projection gives the gate, what is convolved (values, keys, queries) and the steps."""
    assert found.states.matrices is not None
    assert found.weight is not None
    _, n, v_dim, k_dim = found.states.matrices.shape
    value, n_channels = n * v_dim, len(found.weight)
    n_keys, rest = divmod(n_channels - value, 2 * k_dim)
    if rest or n_keys < 1 or n % n_keys or found.widths != [value + n_channels + n]:
        raise found.refused(f"its projections give {found.widths} columns for {n_channels} channels of {n} heads")
    low, high = getattr(found.call.module, "time_step_limit", (0.0, NO_LIMIT))
    rate, bias, skip = _rates(found, n), _tensor(found, "dt_bias", n), _tensor(found, "D", n)
    fading = Fading(BY_SOFTPLUS, rate, bias, low=float(low), high=min(float(high), NO_LIMIT))
    heads = Heads(n, n_keys, k_dim, v_dim, value + n_keys * k_dim, value, 0)
    norm = _gated_norm(found, value)
    return found.layer(
        (Segment(HeadColumns(0, (value,)), n_channels),), has_silu=True, norm=norm,
        recurrence=Recurrence(SCAN, heads, fading, fades=_row(0, value + n_channels, n, 1), skip=skip),
        gate=HeadColumns(0, tuple(range(0, value, norm.group))),
    )  # fmt: skip


# Gated delta rule -----------------------------------------------------------------------------------------------------


def _delta(found: _Found) -> Iterator[StateLayer]:
    """The gated delta rule, whose fading is of a head or (Kimi's) of each column of its keys."""
    states = found.states
    assert states.matrices is not None
    assert found.weight is not None
    _, n, k_dim, v_dim = states.matrices.shape
    n_keys, rest = divmod(len(found.weight) - n * v_dim, 2 * k_dim)
    if rest or n_keys < 1 or n % n_keys:
        raise found.refused(f"{len(found.weight)} channels are no queries, keys and values of {n} heads")
    heads = Heads(n, n_keys, k_dim, v_dim, 0, n_keys * k_dim, 2 * n_keys * k_dim)
    norm = _gated_norm(found, n * v_dim)
    if norm.group != v_dim:
        raise found.refused(f"its norm is over {norm.group} columns, its heads have {v_dim}")
    for fading, columns in product(_fadings(found, heads), _columns(found, heads)):
        q, k, v, gate, beta, fades = columns
        segments = (Segment(q, k_dim, L2_EPS, k_dim**-0.5), Segment(k, k_dim, L2_EPS), Segment(v, v_dim))
        recurrence = Recurrence(DELTA, heads, fading, beta, fades)
        yield found.layer(segments, has_silu=True, recurrence=recurrence, norm=norm, gate=gate)


_Columns = tuple[HeadColumns, HeadColumns, HeadColumns, HeadColumns, HeadColumns, HeadColumns]
"""Queries, keys, values, gate, beta, fading."""


def _columns(found: _Found, heads: Heads) -> Iterator[_Columns]:
    """Where each of them may be in the projections."""
    n, n_keys, key, value = heads.n, heads.n_keys, heads.n_keys * heads.k_dim, heads.n * heads.v_dim
    widths = found.widths
    if widths == [2 * key + 2 * value, 2 * n]:
        yield _grouped(heads)
    elif widths == [2 * key + value, value, n, n]:
        q, k, v = (_row(0, first, count, dim) for first, count, dim in _joined(heads))
        for beta, fades in ((2, 3), (3, 2)):
            yield q, k, v, _row(1, 0, n, heads.v_dim), _row(beta, 0, n, 1), _row(fades, 0, n, 1)
    elif widths[:3] == [key, key, value] and len(widths) > 5:
        q, k = (_row(number, 0, n_keys, heads.k_dim) for number in (0, 1))
        gate = _gate_number(found)
        read = {number for number, _ in found.behind}
        left = [number for number in range(3, len(widths)) if number != gate and number not in read]
        betas = [number for number in left if widths[number] == n]
        fadings = [number for number in left if widths[number] == n * heads.k_dim]
        for one, other in product(betas, fadings):
            yield (
                q, k, _row(2, 0, n, heads.v_dim), _row(gate, 0, n, heads.v_dim), _row(one, 0, n, 1),
                _row(other, 0, n, heads.k_dim),
            )  # fmt: skip
    else:
        raise found.refused(f"its projections give {widths} columns")


def _joined(heads: Heads) -> tuple[tuple[int, int, int], ...]:
    """First column, number and width of queries, keys and values behind each other."""
    key = heads.n_keys * heads.k_dim
    return (0, heads.n_keys, heads.k_dim), (key, heads.n_keys, heads.k_dim), (2 * key, heads.n, heads.v_dim)


def _row(number: int, first: int, n: int, dim: int) -> HeadColumns:
    """Heads that follow each other from a column on."""
    return HeadColumns(number, tuple(range(first, first + n * dim, dim)))


def _grouped(heads: Heads) -> _Columns:
    """Each head of keys with all that belongs to it: query, key, its values, their gates; in the second projection beta
    of its values, then their fading."""
    each, k_dim, v_dim = heads.n // heads.n_keys, heads.k_dim, heads.v_dim
    step = 2 * k_dim + 2 * each * v_dim
    firsts = [step * head for head in range(heads.n_keys)]
    values = [first + 2 * k_dim + v_dim * i for first in firsts for i in range(each)]
    beta = [2 * each * head + i for head in range(heads.n_keys) for i in range(each)]
    return (
        HeadColumns(0, tuple(firsts)), HeadColumns(0, tuple(first + k_dim for first in firsts)),
        HeadColumns(0, tuple(values)), HeadColumns(0, tuple(first + each * v_dim for first in values)),
        HeadColumns(1, tuple(beta)), HeadColumns(1, tuple(first + each for first in beta)),
    )  # fmt: skip


def _gate_number(found: _Found) -> int:
    """Number of the projection that the norm is given as its gate."""
    (norm,) = found.norms
    gate = norm.args[1]
    number = next((number for number, made in enumerate(found.projections) if same(made.result, gate)), None)
    if number is None:
        raise found.refused("the gate of its norm comes from no projection")
    return number


def _fadings(found: _Found, heads: Heads) -> Iterator[Fading]:
    """How much a token keeps of a matrix: by its step, or within a bound that a module names."""
    rate = _rates(found, heads.n)
    bias = _tensor(found, "dt_bias", heads.n, heads.n * heads.k_dim)
    each = bias.size != heads.n
    yield Fading(BY_SOFTPLUS, rate, bias, each)
    bounds = {getattr(module, "lower_bound", None) for module in found.call.module.modules()}
    for bound in sorted(bound for bound in bounds if isinstance(bound, int | float)):
        yield Fading(BY_SIGMOID, rate, bias, each, float(bound))


def _rates(found: _Found, n: int) -> np.ndarray:
    """How fast each of n heads forgets, with the bits that the layer's own code gives."""
    return torch.from_numpy(_tensor(found, "A_log", n)).exp().numpy()


def _tensor(found: _Found, name: str, *sizes: int) -> np.ndarray:
    """The values of a parameter or buffer of the layer by its name, float32, one after another."""
    own = (*found.call.module.named_parameters(), *found.call.module.named_buffers())
    named = [value for path, value in own if path.rpartition(".")[2] == name]
    if len(named) != 1 or named[0].numel() not in sizes:
        raise found.refused(f"expected one {name} of {' or '.join(map(str, sizes))} values, found {len(named)}")
    return array(named[0]).ravel()


# The norm -------------------------------------------------------------------------------------------------------------


def _gated_norm(found: _Found, n_columns: int) -> GatedNorm:
    """The norm behind the recurrence, over all `n_columns` of a row."""
    if len(found.norms) != 1 or len(found.norms[0].args) != 2:
        raise found.refused(f"{len(found.norms)} norms stand behind its heads, expected one with a gate")
    norm = read_gated_norm(found.norms[0].module)
    if norm is None or n_columns % norm.weight.size:
        raise found.refused(f"{found.norms[0].path} is no norm with a gate that the step knows")
    weight = np.tile(norm.weight, n_columns // norm.weight.size)
    return GatedNorm(weight, norm.eps, norm.group, norm.has_sigmoid, norm.gate_first)


def read_gated_norm(module: nn.Module) -> GatedNorm | None:
    """The norm that a module of values and their gate is, over as many columns as its weight has; None where it is none
    that the step knows."""
    weights = dict(module.named_parameters())
    if len(weights) != 1 or any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    (parameter,) = weights.values()
    if parameter.dim() != 1:
        return None
    weight, own = array(parameter), copy.deepcopy(module).float()
    generator = torch.Generator().manual_seed(0)
    x, gate = (2 * torch.randn(SAMPLES, weight.size, generator=generator) + 0.5 for _ in range(2))
    with torch.no_grad():
        try:
            expected = own(x, gate)
        except (RuntimeError, TypeError, ValueError):
            return None
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape:
        return None
    largest = float(expected.abs().max()) + 1e-30
    for norm in _norm_forms(module, weight):
        if float((_normed(norm, x, gate) - expected.float()).abs().max()) <= NORM_TOLERANCE * largest:
            return norm
    return None


def _norm_forms(module: nn.Module, weight: np.ndarray) -> Iterator[GatedNorm]:
    numbers = [value for value in vars(module).values() if not isinstance(value, bool)]
    eps = sorted({float(value) for value in numbers if isinstance(value, float) and 0 < value < 1e-2})
    groups = {value for value in numbers if isinstance(value, int) and 0 < value < weight.size}
    groups = {weight.size} | {value for value in groups if weight.size % value == 0}
    for one, scaled, group in product(eps or [L2_EPS], (weight, 1 + weight), sorted(groups, reverse=True)):
        for has_sigmoid, gate_first in product((False, True), repeat=2):
            yield GatedNorm(scaled, one, group, has_sigmoid, gate_first)


def _normed(norm: GatedNorm, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The obvious form of what the compiled norm computes."""
    factor = torch.sigmoid(gate) if norm.has_sigmoid else nn.functional.silu(gate)
    x = x * factor if norm.gate_first else x
    groups = x.unflatten(-1, (-1, norm.group))
    groups = groups / (groups.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    result: torch.Tensor = groups.flatten(-2) * torch.from_numpy(norm.weight)
    return result if norm.gate_first else result * factor
