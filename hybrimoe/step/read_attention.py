"""Attention modules: projections, norms and rotation are found by which tensor went where in the recorded step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from cpu_kernels.step.heads import HALVES, NO_CLIP, PAIRS, PAIRS_TO_HALVES, HeadNorm
from cpu_kernels.step.parts import Attention, Columns, Latent, Rope
from cpu_kernels.step.stream import Norm
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.read_parts import LINEARS, array, read_linear, read_norm
from hybrimoe.step.trace import Call, Trace, same


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
    """The modules inside an attention call, by what they read."""

    first: list[Call]
    norms: list[tuple[Call, Norm]]
    later: list[Call]
    output: Call


def read_attention(trace: Trace, call: Call, ropes: RopeTables) -> Iterator[Attention]:
    """The forms that this attention may have, the usual ones first; which one it is, the comparison tells.

    Raises NotCompiled where it is none that the step knows.
    """
    module: Any = call.module
    found = _parts(trace, call)
    cache = _cache_number(call)
    layer: Any = trace.cache.layers[cache]
    n_kv_heads, dim, v_dim = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
    output = read_linear(found.output.module, found.output.path)
    n_heads = output.n_in // v_dim
    if output.n_in != n_heads * v_dim or n_heads % n_kv_heads:
        raise NotCompiled(f"{call.path}: {output.n_in} columns are no whole number of heads of {v_dim}")
    table = ropes.find(call)
    sinks = getattr(module, "sinks", None)
    common = {
        "output": output, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "dim": dim, "v_dim": v_dim, "cache": cache,
        "scale": float(getattr(module, "scaling", dim**-0.5)), "window": _window(layer),
        "sinks": array(sinks) if isinstance(sinks, torch.Tensor) else None,
        "clip": float(getattr(module.config, "clip_qkv", None) or NO_CLIP),
    }  # fmt: skip
    if found.later:
        plain: Attention = _latent(call, found, common)
        norms: list[HeadNorm | None] = [None]
    else:
        plain, norms = _heads(call, found, common), _head_norms(found, n_heads, n_kv_heads, dim)
    for norm, rope in product(norms, _ropes(table, dim)):
        yield replace(plain, norm=norm, rope=rope)


def _parts(trace: Trace, call: Call) -> _Found:
    inside = list(trace.within(call.path))
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


def _cache_number(call: Call) -> int:
    number = getattr(call.module, "layer_idx", None)
    if not isinstance(number, int):
        raise NotCompiled(f"{call.path}: it does not say which layer of the cache is its own (layer_idx)")
    return number


def _window(layer: Any) -> int:
    return int(layer.sliding_window) if getattr(layer, "is_sliding", False) else 0


def _ropes(table: tuple[int, int] | None, dim: int) -> list[Rope | None]:
    if table is None:
        return [None]
    number, n = table
    if n > dim:
        raise NotCompiled(f"{n} columns are rotated, but a head has {dim}")
    firsts = [0] if n == dim else [0, dim - n]
    return [Rope(number, n, first, kind) for first in firsts for kind in (HALVES, PAIRS, PAIRS_TO_HALVES)]


def _heads(call: Call, found: _Found, common: dict[str, Any]) -> Attention:
    """Queries, keys and values from three products, or from one."""
    n_heads, n_kv_heads, dim, v_dim = (common[name] for name in ("n_heads", "n_kv_heads", "dim", "v_dim"))
    inputs = tuple(read_linear(inner.module, inner.path) for inner in found.first)
    widths = [n_heads * dim, n_kv_heads * dim, n_kv_heads * v_dim]
    sizes = [item.n_out for item in inputs]
    if sizes == widths:
        places = [Columns(0, 0, dim), Columns(1, 0, dim), Columns(2, 0, v_dim)]
    elif sizes == [sum(widths)]:
        places = [Columns(0, 0, dim), Columns(0, widths[0], dim), Columns(0, widths[0] + widths[1], v_dim)]
    else:
        raise NotCompiled(f"{call.path}: projections give {sizes} columns, expected {widths} for q, k and v")
    return Attention(inputs, q=places[0], k=places[1], v=places[2], **common)


def _head_norms(found: _Found, n_heads: int, n_kv_heads: int, dim: int) -> list[HeadNorm | None]:
    """What the two norms of queries and keys may be: before the rotation or after it."""
    if not found.norms:
        return [None]
    if len(found.norms) != 2:
        paths = ", ".join(inner.path for inner, _ in found.norms)
        raise NotCompiled(f"attention has {len(found.norms)} norms ({paths}), expected none or two")
    (_, q), (_, k) = found.norms
    if q.centred or k.centred or q.bias is not None or k.bias is not None or q.eps != k.eps:
        raise NotCompiled("norms of queries and keys with a mean, a bias or unlike eps")
    whole = (q.weight.size, k.weight.size) == (n_heads * dim, n_kv_heads * dim) and n_heads * n_kv_heads > 1
    if not whole and (q.weight.size, k.weight.size) != (dim, dim):
        raise NotCompiled(f"norms of queries and keys over {q.weight.size} and {k.weight.size} columns")
    norm = HeadNorm(q.weight, k.weight, q.eps, whole_row=whole)
    return [norm] if whole else [norm, replace(norm, after_rotation=True)]


def _latent(call: Call, found: _Found, common: dict[str, Any]) -> Attention:
    """Multi-head latent attention: keys and values (and maybe queries) come through a short vector."""
    n_heads, dim, v_dim = common["n_heads"], common["dim"], common["v_dim"]
    if len(found.first) != 2 or common["n_kv_heads"] != n_heads:
        raise NotCompiled(f"{call.path}: projections behind projections, but no latent attention")
    by_input = {id(inner): norm for inner, norm in found.norms}
    query, down = found.first
    ups = {linear.path: linear for linear in found.later}
    up = found.later[-1]
    normed = next((inner for inner, _ in found.norms if same(inner.result, up.input)), None)
    if normed is None:
        raise NotCompiled(f"{call.path}: the latent vector reaches {up.path} without a norm")
    first, second, query_norm = read_linear(query.module, query.path), None, None
    if len(ups) == 2:
        behind = found.later[0]
        before = next((inner for inner, _ in found.norms if same(inner.result, behind.input)), None)
        if before is None:
            raise NotCompiled(f"{call.path}: the short query reaches {behind.path} without a norm")
        second, query_norm = read_linear(behind.module, behind.path), by_input[id(before)]
    elif len(ups) != 1:
        raise NotCompiled(f"{call.path}: {len(ups)} projections behind others, expected one or two")
    low, high = read_linear(down.module, down.path), read_linear(up.module, up.path)
    own = high.n_out // n_heads - v_dim  # columns of a key head that are not rotated
    if (
        (second or first).n_out != n_heads * dim
        or high.n_out != n_heads * (own + v_dim)
        or low.n_out - high.n_in != dim - own
    ):
        raise NotCompiled(f"{call.path}: sizes of its latent projections do not fit together")
    return Attention(
        (first,), q=Columns(0, 0, dim), k=Columns(1, 0, own + v_dim), v=Columns(1, own, own + v_dim),
        query_norm=query_norm, query_up=second, latent=Latent(low, by_input[id(normed)], high, high.n_in), **common,
    )  # fmt: skip


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
