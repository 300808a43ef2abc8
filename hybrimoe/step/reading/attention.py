"""Attention modules: projections, norms and rotation are found by which tensor went where in the recorded step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from cpu_kernels.step.attend import SIGMOID_GATE, SOFTPLUS_GATE, Sight
from cpu_kernels.step.heads import HALVES, NO_CLIP, PAIRS, PAIRS_TO_HALVES, HeadNorm, Tuning
from cpu_kernels.step.latent import LatentSizes
from cpu_kernels.step.parts import Attention, Columns, GateColumns, HeadGate, LatentAttention, Rope
from cpu_kernels.step.products import Product, plain_product
from cpu_kernels.step.stream import Norm
from hybrimoe.dense.linear import PackedLinear
from hybrimoe.generation.growing import GrowingIndexedLayer, GrowingLayer
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.reading.index import Choice, choice_of, read_index
from hybrimoe.step.reading.parts import LINEARS, array, read_linear, read_matrix, read_norm
from hybrimoe.step.trace import NEW_TOKENS, Call, Trace, same

FAR, FAR_STEPS = 100_000, 3
"""A far position where nothing says which are, and steps of what grows that lie before a far one."""

VALUE_SCALE_TOLERANCE = 1e-2
"""Relative, of a factor that is found from bfloat16 values."""


@dataclass(slots=True)
class RopeTables:
    """The rotary modules of a model: each distinct way in which one was called is a table of angles."""

    trace: Trace
    sources: list[tuple[Call, bool]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def find(self, call: Call) -> tuple[int, int] | None:
        """(table, rotated columns) of an attention call; None where no angles are passed to it."""
        tensors = [value for value in _angles(call) if isinstance(value, torch.Tensor)]
        if not tensors:
            return None
        source = next(
            (made for made in self.trace.calls if any(same(a, tensors[0]) for a in _tensors(made.output))), None
        )
        if source is None:
            raise NotCompiled(f"{call.path}: the angles of its rotary embedding come from no module of the model")
        n, doubled = _rotated_columns(tensors[0])
        for index, (known, _) in enumerate(self.sources):
            if known is source:
                return index, n
        self.sources.append((source, doubled))
        self.sizes.append(n // 2)
        return len(self.sources) - 1, n


def _angles(call: Call) -> list[Any]:
    values = [*call.kwargs.values(), *call.args[1:]]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_complex():
            return [value]
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, torch.Tensor) for part in value):
            return list(value)
    return []


def _tensors(output: Any) -> list[torch.Tensor]:
    values = output if isinstance(output, tuple | list) else [output]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _rotated_columns(cos: torch.Tensor) -> tuple[int, bool]:
    """(columns that are rotated, whether each cosine stands twice)."""
    if cos.is_complex():
        return 2 * cos.shape[-1], False
    return (cos.shape[-1], True) if half_angles(cos).shape[-1] * 2 == cos.shape[-1] else (2 * cos.shape[-1], False)


def half_angles(values: torch.Tensor) -> torch.Tensor:
    """Each angle's value once, [..., n / 2]: of a row that repeats its first half, or each of its values."""
    n = values.shape[-1]
    if n % 2 == 0 and torch.equal(values[..., : n // 2], values[..., n // 2 :]):
        return values[..., : n // 2]
    if n % 2 == 0 and torch.equal(values[..., ::2], values[..., 1::2]):
        return values[..., ::2]
    return values


@dataclass(frozen=True, slots=True)
class _Found:
    """The modules inside an attention call, by what they read: `first` the block's input, `later` something else."""

    first: list[Call]
    norms: list[tuple[Call, Norm]]
    later: list[Call]
    output: Call


def read_attention(trace: Trace, call: Call, ropes: RopeTables) -> Iterator[Attention | LatentAttention]:
    """The forms that this attention may have, the usual ones first; which one it is, the comparison tells.

    Raises NotCompiled where it is none that the step knows.
    """
    _check_inputs(call)
    cache = cache_number(call)
    layer: Any = trace.cache.layers[cache] if cache < len(trace.cache.layers) else None
    if not isinstance(layer, GrowingLayer) or not layer.is_initialized:
        raise NotCompiled(f"{call.path} ({type(call.module).__name__}) keeps a state of its own, not keys and values")
    choice = choice_of(trace, call, cache)
    found = _parts(trace, call, choice)
    table = ropes.find(call)
    if found.later:
        for latent in _latent(call, found, layer, cache, table):
            yield latent if choice is None else _with_choice(trace, call, latent, choice, found, table, layer)
        return
    if choice is not None or isinstance(layer, GrowingIndexedLayer):
        raise NotCompiled(f"{call.path} ({type(call.module).__name__}) attends only to tokens that an index chooses")
    module: Any = call.module
    n_kv_heads, dim, v_dim = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
    output = read_linear(found.output.module, found.output.path)
    n_heads = output.n_in // v_dim
    if output.n_in != n_heads * v_dim or n_heads % n_kv_heads:
        raise NotCompiled(f"{call.path}: {output.n_in} columns are no whole number of heads of {v_dim}")
    sinks = getattr(module, "sinks", None)
    forms = _heads(
        call, found, output=output, n_heads=n_heads, n_kv_heads=n_kv_heads, dim=dim, v_dim=v_dim, cache=cache,
        scale=float(getattr(module, "scaling", dim**-0.5)), sight=_sight(trace, call, layer),
        sinks=array(sinks) if isinstance(sinks, torch.Tensor) else None,
        clip=float(getattr(module.config, "clip_qkv", None) or NO_CLIP), v_scale=_value_scale(call, found, layer),
    )  # fmt: skip
    for plain, norm, rope in product(forms, _head_norms(found, n_heads, n_kv_heads, dim), _ropes(table, dim)):
        yield replace(
            plain, norm=norm, rope=rope, tuning=_tuning(module) if rope is None else _tuning_by_position(call)
        )


def _check_inputs(call: Call) -> None:
    """Raises NotCompiled for what a comparison over a few tokens cannot tell: effects of far positions."""
    known = [call.input, *_angles(call)]
    for name, value in call.kwargs.items():
        own = "mask" in name or any(value is item for item in known)
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()) and not own:
            raise NotCompiled(f"{call.path}: it is given {name}, which the step does not know")


def reads_positions(call: Call) -> bool:
    """Whether a module is given the tokens' positions for itself, beside their angles: it is compared at far ones."""
    return "position_ids" in inspect.signature(type(call.module).forward).parameters


def far_positions(tuning: Tuning | None) -> list[int]:
    """Positions of the new tokens at which what grows with them has grown, and grows again from token to token."""
    step = int(tuning.step) if tuning is not None else FAR
    return [FAR_STEPS * step - NEW_TOKENS // 2 + row for row in range(NEW_TOKENS)]


def at_positions(trace: Trace, call: Call, positions: list[int]) -> torch.Tensor:
    """What an attention call of the trace gives if its tokens stand elsewhere, with the same angles. Raises NotCompiled
    where it does not run so."""
    cache = copy.deepcopy(trace.cache)
    cache.layers[cache_number(call)].crop(-NEW_TOKENS)

    def other(name: str, value: Any) -> Any:
        return torch.tensor([positions]) if name == "position_ids" else cache if value is trace.cache else value

    kwargs = {name: other(name, value) for name, value in call.kwargs.items()}
    with torch.no_grad():
        try:
            output = call.module.forward(*(other("", value) for value in call.args), **kwargs)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise NotCompiled(f"{call.path} does not run at far positions ({type(error).__name__}: {error})") from error
    return replace(call, output=output).result


def _parts(trace: Trace, call: Call, choice: Choice | None) -> _Found:
    """What is inside an attention, without its index."""
    inside = list(trace.within(call.path))
    if choice is not None and not choice.is_earlier:
        own = choice.call
        inside = [inner for inner in inside if inner is not own and not inner.path.startswith(f"{own.path}.")]
    linears = [inner for inner in inside if isinstance(inner.module, LINEARS)]
    if len(linears) < 2:
        raise NotCompiled(f"{call.path} ({type(call.module).__name__}) has {len(linears)} linear layers, expected more")
    *rest, output = linears
    if not same(output.result, call.result):
        raise NotCompiled(f"{call.path}: its last linear layer does not give its result")
    first = [inner for inner in rest if same(inner.input, call.input)]
    later = [inner for inner in rest if inner not in first]
    norms = []
    for inner in inside:
        if isinstance(inner.module, LINEARS) or not isinstance(inner.output, torch.Tensor):
            continue
        norm = read_norm(inner.module, inner.input.shape[-1])
        if norm is None:
            raise NotCompiled(f"{inner.path} ({type(inner.module).__name__}) inside attention is not known")
        norms.append((inner, norm))
    return _Found(first, norms, later, output)


def cache_number(call: Call) -> int:
    """Which layer of the cache is the call's. Raises NotCompiled where its module does not say."""
    number = getattr(call.module, "layer_idx", None)
    if not isinstance(number, int):
        raise NotCompiled(f"{call.path}: it does not say which layer of the cache is its own (layer_idx)")
    return number


def _sight(trace: Trace, call: Call, layer: Any) -> Sight:
    """What tokens look at. A model's own kind of cache does not know of windows; the configuration does.

    Raises NotCompiled for a window that has moved in the recorded step: what left it cannot be compared.
    """
    module: Any = call.module
    if type(trace.cache) is not DynamicCache:
        return Sight(int(getattr(module.config, "sliding_window", None) or 0))
    if not getattr(layer, "is_sliding", False):
        return Sight()
    window = int(layer.sliding_window)
    if window <= trace.token_ids.shape[1]:
        raise NotCompiled(f"{call.path}: its window of {window} tokens is shorter than the comparison")
    kinds = getattr(module.config, "layer_types", None) or []
    return Sight(window, len(kinds) > module.layer_idx and kinds[module.layer_idx] == "chunked_attention")


def _tuning(module: Any) -> Tuning | None:
    """Llama-4's temperature of layers without rotation, which grows too late for the comparison to see it."""
    if not getattr(module, "attn_temperature_tuning", False):
        return None
    return Tuning(float(module.attn_scale), float(module.floor_scale))


def _tuning_by_position(call: Call) -> Tuning | None:
    """Mistral's, of the same form, which counts where a token stands; it is compared at far positions."""
    config: Any = call.module.config
    numbers = getattr(config, "rope_parameters", None) or {}
    factor, step = numbers.get("llama_4_scaling_beta"), numbers.get("original_max_position_embeddings")
    if not reads_positions(call) or not factor or not step:
        return None
    return Tuning(float(factor), float(step), by_position=True)


def _ropes(table: tuple[int, int] | None, dim: int) -> list[Rope | None]:
    """The ways of rotating `dim` columns; the last: not at all."""
    if table is None:
        return [None]
    number, n = table
    if n > dim:
        raise NotCompiled(f"{n} columns are rotated, but a head has {dim}")
    firsts = [0] if n == dim else [0, dim - n]
    return [*(Rope(number, n, first, kind) for first in firsts for kind in (HALVES, PAIRS, PAIRS_TO_HALVES)), None]


def _heads(call: Call, found: _Found, **sizes: Any) -> list[Attention]:
    """Queries, keys and values from three products, or from one; a gate of the result by itself, or behind each query
    head. Where there is one by itself, the ways in which it may work."""
    n_heads, n_kv_heads, dim, v_dim = (sizes[name] for name in ("n_heads", "n_kv_heads", "dim", "v_dim"))
    inputs = tuple(read_linear(inner.module, inner.path) for inner in found.first)
    q, k, v = n_heads * dim, n_kv_heads * dim, n_kv_heads * v_dim
    widths = [item.n_out for item in inputs]
    own = [Columns(0, 0, dim), Columns(1, 0, dim), Columns(2, 0, v_dim)]
    gates: list[GateColumns | None] = [None]
    if widths[:3] == [q, k, v] and widths[3:] in ([n_heads * v_dim], [n_heads]):
        n = widths[3] // n_heads
        gates = [GateColumns(Columns(3, 0, n), n, kind) for kind in (SIGMOID_GATE, SOFTPLUS_GATE)]
    elif widths == [2 * q, k, v] and dim == v_dim:
        own[0], gates = Columns(0, 0, 2 * dim), [GateColumns(Columns(0, dim, 2 * dim), dim, SIGMOID_GATE)]
    elif widths == [q + k + v]:
        own = [Columns(0, 0, dim), Columns(0, q, dim), Columns(0, q + k, v_dim)]
    elif widths == [q, k] and dim == v_dim:  # values are what keys are before their norm and rotation
        own[2] = Columns(1, 0, v_dim)
    elif widths != [q, k, v]:
        raise NotCompiled(f"{call.path}: projections give {widths} columns, expected {[q, k, v]} for q, k and v")
    return [Attention(inputs, q=own[0], k=own[1], v=own[2], gate=gate, **sizes) for gate in gates]


def _value_scale(call: Call, found: _Found, layer: Any) -> float:
    """What the values of the recorded step were multiplied with between their projection and the cache: a number of the
    module's own, where one is near."""
    if len(found.first) < 3 or len(found.norms) > 2:
        return 1.0
    given = found.first[2].result.double().flatten()
    kept = layer.values[0, :, -NEW_TOKENS:].transpose(0, 1).double().flatten()
    if given.numel() != kept.numel():
        return 1.0
    scale = float(given @ kept / (given @ given + 1e-300))
    known = [1.0, *(value for value in vars(call.module).values() if isinstance(value, float))]
    nearest = min(known, key=lambda one: abs(one - scale))
    return nearest if abs(nearest - scale) <= VALUE_SCALE_TOLERANCE * abs(scale) else scale


def _head_norms(found: _Found, n_heads: int, n_kv_heads: int, dim: int) -> list[HeadNorm | None]:
    """What the two norms of queries and keys may be: before the rotation or after it."""
    if not found.norms:
        return [None]
    if len(found.norms) not in (2, 3):
        paths = ", ".join(inner.path for inner, _ in found.norms)
        raise NotCompiled(f"attention has {len(found.norms)} norms ({paths}), expected none, two or three")
    (_, q), (_, k), *others = found.norms
    if any(norm.centred or norm.bias is not None or norm.eps != q.eps for _, norm in others):
        raise NotCompiled("a norm of values with a mean, a bias or another eps")
    v_weight = others[0][1].weight if others else None
    if q.centred or k.centred or q.bias is not None or k.bias is not None or q.eps != k.eps:
        raise NotCompiled("norms of queries and keys with a mean, a bias or unlike eps")
    whole = (q.weight.size, k.weight.size) == (n_heads * dim, n_kv_heads * dim) and n_heads * n_kv_heads > 1
    if not whole and (q.weight.size, k.weight.size) != (dim, dim):
        raise NotCompiled(f"norms of queries and keys over {q.weight.size} and {k.weight.size} columns")
    norm = HeadNorm(q.weight, k.weight, q.eps, whole_row=whole, v_weight=v_weight)
    return [norm] if whole else [norm, replace(norm, after_rotation=True)]


def _latent(
    call: Call, found: _Found, layer: Any, cache: int, table: tuple[int, int] | None
) -> Iterator[LatentAttention]:
    """Multi-head latent attention: what the cache holds goes through one projection to all keys and values."""
    module: Any = call.module
    *behind, up = found.later
    if len(found.first) not in (2, 3) or len(behind) > 1 or not same(up.input, layer.keys):
        raise NotCompiled(f"{call.path}: projections behind projections, but no latent attention")
    if getattr(layer, "is_sliding", False):
        raise NotCompiled(f"{call.path}: latent attention with a window")
    query, down, *gate = found.first
    rank, kept = layer.keys.shape[-1], layer.keys[0, 0, -NEW_TOKENS:]
    norm = _norm_between(call, found, down.result[..., :rank], kept)
    rotated_norm = _norm_between(call, found, down.result[..., rank:], None)
    if norm is None or any(one.centred or one.bias is not None for one in (norm, rotated_norm) if one is not None):
        raise NotCompiled(f"{down.path}: the vector that the cache holds comes through no plain norm")
    query_up = query_norm = None
    if behind:
        query_up = read_linear(behind[0].module, behind[0].path)
        query_norm = _norm_between(call, found, query.result, behind[0].input)
        if query_norm is None:
            raise NotCompiled(f"{call.path}: the short query reaches {behind[0].path} without a norm")
    low, output = read_linear(down.module, down.path), read_linear(found.output.module, found.output.path)
    first = read_linear(query.module, query.path)
    matrix, up_rows = _rows_of(up)
    sizes = _latent_sizes(call, (query_up or first).n_out, matrix, output.n_in, low.n_out - matrix.n_in)
    n_norms = 1 + len(behind) + (rotated_norm is not None)
    if len(found.norms) != n_norms:
        raise NotCompiled(f"{call.path}: it has {len(found.norms)} norms, expected {n_norms}")
    factors = [1.0, *(value for value in vars(module).values() if isinstance(value, float) and value > 0)]
    for factor, form, rope in product(factors, _head_gates(gate, sizes.n_heads), _ropes(table, sizes.rotated)):
        scale = factor * float(module.scaling)  # some multiply queries with a number of the module's own
        yield LatentAttention(
            first, low, norm, matrix, output, sizes, rope, scale, cache, query_norm, query_up, up_rows,
            _tuning_by_position(call), gate=form, rotated_norm=rotated_norm,
        )  # fmt: skip


def _head_gates(gate: list[Call], n_heads: int) -> list[HeadGate | None]:
    """The ways in which a projection may let each head's result through; none where there is none."""
    if not gate:
        return [None]
    own = read_linear(gate[0].module, gate[0].path)
    if own.n_out != n_heads:
        raise NotCompiled(f"{gate[0].path}: {own.n_out} columns beside latent attention, expected {n_heads} for heads")
    return [HeadGate(own, kind) for kind in (SIGMOID_GATE, SOFTPLUS_GATE)]


def _with_choice(
    trace: Trace, call: Call, latent: LatentAttention, choice: Choice, found: _Found, table: tuple[int, int] | None,
    layer: Any,
) -> LatentAttention:  # fmt: skip
    """Latent attention to no more tokens than are chosen, by an index that reads the same short query."""
    if choice.is_earlier:
        return replace(latent, top_k=choice.top_k)
    if latent.query_up is None:
        raise NotCompiled(f"{choice.call.path}: an index without a short query")
    own, others = ([value for value in _angles(one) if isinstance(value, torch.Tensor)] for one in (choice.call, call))
    if table is None or len(own) != 2 or not all(same(one, other) for one, other in zip(own, others, strict=True)):
        raise NotCompiled(f"{choice.call.path}: an index with other angles than its attention")
    halves, ropes = [half_angles(value) for value in own], partial(_ropes, table)
    index = read_index(trace, choice, found.later[0].input, halves, ropes, layer)
    return replace(latent, top_k=choice.top_k, index=index)


def _norm_between(call: Call, found: _Found, before: torch.Tensor, after: torch.Tensor | None) -> Norm | None:
    """The norm that reads `before`, and what it is multiplied with until it is `after` (None: with nothing) as a part
    of its weights; None where there is no such norm."""
    for inner, norm in found.norms:
        reads = inner.input.numel() == before.numel() and torch.equal(inner.input.flatten(), before.flatten())
        if not reads or norm.weight.size != before.shape[-1]:
            continue
        scale = 1.0 if after is None else _own_factor(call.module, inner.result, after)
        if scale is not None:
            return replace(norm, weight=norm.weight * np.float32(scale))
    return None


def _own_factor(module: Any, given: torch.Tensor, kept: torch.Tensor) -> float | None:
    """s of kept = s * given, a number of the module's own or 1; None where there is none such."""
    if given.numel() != kept.numel():
        return None
    one, other = given.double().flatten(), kept.double().flatten()
    scale = float(one @ other / (one @ one + 1e-300))
    known = [1.0, *(value for value in vars(module).values() if isinstance(value, float))]
    nearest = min(known, key=lambda value: abs(value - scale))
    left = float((other - nearest * one).norm() / (other.norm() + 1e-300))
    return nearest if left <= VALUE_SCALE_TOLERANCE else None


def _latent_sizes(call: Call, n_query: int, up: Product, n_result: int, rotated: int) -> LatentSizes:
    """Sizes of heads from those of the products. Raises NotCompiled where they do not fit together."""
    n_heads = (n_query - up.n_out + n_result) // rotated if rotated > 0 else 0
    if n_heads < 1 or (n_query % n_heads, up.n_out % n_heads, n_result % n_heads) != (0, 0, 0):
        raise NotCompiled(f"{call.path}: sizes of its latent projections do not fit together")
    sizes = LatentSizes(n_heads, n_query // n_heads - rotated, rotated, n_result // n_heads, up.n_in)
    if sizes.own < 1 or up.n_out != n_heads * (sizes.own + sizes.v_dim):
        raise NotCompiled(f"{call.path}: sizes of its latent projections do not fit together")
    return sizes


def _rows_of(up: Call) -> tuple[Product, np.ndarray | None]:
    """A projection as rows that can be added up; of a packed one a copy in bfloat16, and the memory that it lies in."""
    module: Any = up.module
    if module.bias is not None:
        raise NotCompiled(f"{up.path}: a bias of keys and values")
    if not isinstance(module, PackedLinear):
        return read_matrix(module.weight, up.path), None
    rows = module.weight.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return plain_product(rows.ctypes.data, *rows.shape, halves=True), rows


def angles_at(source: Call, positions: torch.Tensor, doubled: bool) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin float32 [n, angles] of a rotary module at positions int64 [1, n]; asked as in the recorded step."""
    args = list(source.args)
    kwargs = dict(source.kwargs)
    places = [i for i, value in enumerate(args) if isinstance(value, torch.Tensor) and not value.is_floating_point()]
    if places:
        args[places[-1]] = positions
    else:
        name = next(
            key for key, value in kwargs.items() if isinstance(value, torch.Tensor) and not value.is_floating_point()
        )
        kwargs[name] = positions
    args = [_as_float32(value) for value in args]
    with torch.no_grad():
        output = source.module.forward(*args, **{key: _as_float32(value) for key, value in kwargs.items()})
    values = _tensors(output)
    cos, sin = (values[0].real, values[0].imag) if values[0].is_complex() else (values[0], values[1])
    n = cos.shape[-1] // 2 if doubled else cos.shape[-1]
    found = [half_angles(part) if doubled else part for part in (cos, sin)]
    if doubled and found[0].shape[-1] != n:  # one position at which all angles happen to agree
        found = [part[..., :n] for part in (cos, sin)]
    rows = [part.float().reshape(-1, n).contiguous().numpy() for part in found]
    return rows[0], rows[1]


def _as_float32(value: Any) -> Any:
    """Floating arguments only say which dtype the angles get: float32, which loses nothing."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value[:1, :1].float() if is_float and value.dim() >= 2 else value
