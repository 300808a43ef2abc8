"""A decoder layer as branches: norm, core, norm, and how much of the result is added to the stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.step.parts import Branch, Core, Mlp, Moe
from cpu_kernels.step.products import Product
from cpu_kernels.step.stream import Norm
from hybrimoe.experts.module import HybridExperts
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.read_attention import RopeTables, cache_number, read_attention
from hybrimoe.step.read_parts import LINEARS, read_linear, read_mlp, read_norm
from hybrimoe.step.read_router import read_router
from hybrimoe.step.read_states import read_state_layer
from hybrimoe.step.trace import Call, Trace, same

FIT_TOLERANCE = 2e-2
"""Relative, of the factor of a branch that is found from bfloat16 values; float32 ones agree to 1e-5."""


@dataclass(frozen=True, slots=True)
class Site:
    """One branch of a recorded layer: the call of its core, its norms, and the stream before and after it.

    scale, keep, renews: as in `cpu_kernels.step.parts.Branch`.
    """

    core: Call
    pre: Norm | None
    post: Norm | None
    before: torch.Tensor
    after: torch.Tensor
    scale: float
    keep: float = 1.0
    renews: bool = False

    def branch(self, core: Core) -> Branch:
        """The branch with a core in its place."""
        return Branch(core, self.pre, self.post, self.scale, self.keep, self.renews)


def sites_of(trace: Trace, call: Call) -> list[Site]:
    """The branches of a layer call, in order. Raises NotCompiled for a layer of another form."""
    stream, norms, cores = call.input, {}, []
    for child in trace.children(call.path):
        norm = read_norm(child.module, stream.shape[-1])
        if norm is not None and child.input.shape[-1] == stream.shape[-1]:
            norms[child.number] = (child, norm)
        else:
            cores.append(child)
    open_sites = []
    for core in cores:
        pre = next((pair for pair in norms.values() if same(pair[0].result, core.input)), None)
        post = next((pair for pair in norms.values() if same(pair[0].input, core.result)), None)
        for pair in (pre, post):
            if pair is not None:
                norms.pop(pair[0].number)
        before = core.input if pre is None else pre[0].input
        open_sites.append((core, pre, post, before))
    if norms or not open_sites:
        left = ", ".join(child.path for child, _ in norms.values()) or "no part at all"
        raise NotCompiled(f"{call.path}: it is not clear what {left} is for")
    afters = [before for _, _, _, before in open_sites[1:]] + [call.result]
    return [_site(call, *item, after) for item, after in zip(open_sites, afters, strict=True)]


def whole_site(core: Call) -> Site:
    """A block by itself, in a layer that is not understood: its result takes the place of its input."""
    return Site(core, None, None, core.input, core.result, 1.0, keep=0.0)


def _site(
    layer: Call, core: Call, pre: tuple[Call, Norm] | None, post: tuple[Call, Norm] | None, before: torch.Tensor,
    after: torch.Tensor,
) -> Site:  # fmt: skip
    """Finds after = keep * stream + scale * result, where the stream is what it was or (it is renewed) its norm."""
    result = core.result if post is None else post[0].result
    if not result.numel() == after.numel() == before.numel():
        raise NotCompiled(f"{core.path}: its result has another size than the stream")
    known = [1.0, *(value for value in vars(layer.module).values() if isinstance(value, float) and value > 0)]
    streams = [before] if pre is None else [before, core.input]
    fits = [_fit(stream, result, after) for stream in streams]
    number = min(range(len(fits)), key=lambda number: fits[number][3])
    (keep, scale, left, _), renews = fits[number], number == 1
    factors = _nearest(known, keep), _nearest(known, scale)
    off = max(abs(one - found) / one for one, found in zip(factors, (keep, scale), strict=True))
    if left > FIT_TOLERANCE * (10 if keep == 1.0 else 1) or off > FIT_TOLERANCE:
        raise NotCompiled(f"{core.path}: its result is not simply added to the stream (off by {max(left, off):.2g})")
    norms = pre and pre[1], post and post[1]
    return Site(core, *norms, before, after, factors[1], factors[0], renews)


def _nearest(known: list[float], value: float) -> float:
    return min(known, key=lambda one: abs(one - value))


def _fit(stream: torch.Tensor, result: torch.Tensor, after: torch.Tensor) -> tuple[float, float, float, float]:
    """(keep, scale, relative rest, rest) of after = keep * stream + scale * result by least squares.

    In bfloat16 a small result leaves its factor uncertain beside the stream: where keep is 1, the difference tells.
    Values count by how exactly they are known, and what rounding explains is no rest.
    """
    x, y, z = (value.double().flatten() for value in (stream, result, after))
    unknown = rounding(after) * z.abs()
    if unknown.any():
        x, y, z, unknown = (value / (unknown + unknown.median()) for value in (x, y, z, unknown))
    scale = float(y @ (z - x) / (y @ y + 1e-300))
    rest = _beyond(z - x - scale * y, unknown)
    left = rest / float((z - x).norm() + 1e-300)
    if left <= 10 * FIT_TOLERANCE:
        return 1.0, scale, left, rest
    factors = torch.linalg.lstsq(torch.stack([x, y], 1), z[:, None]).solution[:, 0]
    keep, scale = float(factors[0]), float(factors[1])
    rest = _beyond(z - keep * x - scale * y, unknown)
    return keep, scale, rest / float(z.norm() + 1e-300), rest


def _beyond(difference: torch.Tensor, unknown: torch.Tensor) -> float:
    """Norm of what a difference has more than is unknown, value by value."""
    return float((difference.abs() - unknown).clamp_min(0).norm())


def rounding(stream: torch.Tensor) -> float:
    """How far the stream may be from the sum that it is, of its values: half a unit in the last place, where it has
    fewer places than the compiled one. Beside values of thousands, which some models carry along from layer to layer,
    that is more than a branch adds."""
    return torch.finfo(stream.dtype).eps / 2 if stream.dtype in (torch.bfloat16, torch.float16) else 0.0


def branches_of(trace: Trace, site: Site, ropes: RopeTables, session: Any) -> Iterator[Branch]:
    """The forms that a branch may have; which one it is, the comparison tells. Raises NotCompiled for none."""
    for core in _cores(trace, site.core, ropes, session):
        yield site.branch(core)


def _cores(trace: Trace, call: Call, ropes: RopeTables, session: Any) -> Iterator[Core]:
    inside = list(trace.within(call.path))
    experts = [inner for inner in inside if isinstance(inner.module, HybridExperts)]
    if experts:
        yield from _moe(call, experts[0], inside, session)
    elif any(value is trace.cache for value in (*call.args, *call.kwargs.values())):
        cache = cache_number(call)
        if cache in trace.states:
            yield from read_state_layer(trace, call, cache)
        else:
            yield from read_attention(trace, call, ropes)
    else:
        yield from read_mlp(call, inside)


def _moe(call: Call, experts: Call, inside: list[Call], session: Any) -> Iterator[Moe]:
    """Router, routed experts and shared experts of a block."""
    module: Any = experts.module
    layer = session.layers[module.layer]
    if not isinstance(layer.backend, NumbaBackend):
        raise NotCompiled(f"{experts.path}: the experts run on the backend {getattr(layer.backend, 'name', '?')!r}")
    if layer.spec.activation.custom is not None:
        raise NotCompiled(f"{experts.path}: the experts' activation has no closed form")
    if layer.transform() is not None:
        raise NotCompiled(f"{experts.path}: a norm stands behind each expert")
    if module.num_identity:
        raise NotCompiled(f"{experts.path}: some experts are the identity")
    if not session.store.in_memory:
        raise NotCompiled(f"{experts.path}: experts are read from disk when they are needed")
    routing = read_router(call, experts, layer.num_experts, call.input.shape[-1])
    addresses = session.store.addresses(module.layer).astype("int64")
    known = (routing.path, experts.path)
    rest = [
        inner for inner in inside if not any(inner.path == path or inner.path.startswith(f"{path}.") for path in known)
    ]
    for shared in _shared(call, rest):
        yield Moe(routing.product, routing.selection, layer.spec, addresses, shared, routing.scaled_inputs)


def _shared(call: Call, rest: list[Call]) -> list[tuple[Mlp, ...]]:
    """The forms that the shared expert may have: none, with or without a switch."""
    switches = [
        inner for inner in rest
        if isinstance(inner.module, LINEARS) and inner.module.out_features == 1 and same(inner.input, call.input)
    ]  # fmt: skip
    outer = [
        inner for inner in rest
        if inner not in switches and not any(inner.path.startswith(f"{other.path}.") for other in rest)
    ]  # fmt: skip
    if not outer and not switches:
        return [()]
    if len(outer) != 1 or len(switches) > 1:
        names = ", ".join(inner.path for inner in (*outer, *switches))
        raise NotCompiled(f"{call.path}: beside its experts it has {names}, expected one shared expert")
    switch: Product | None = read_linear(switches[0].module, switches[0].path) if switches else None
    within = [inner for inner in rest if inner.path.startswith(f"{outer[0].path}.")]
    return [(mlp,) for mlp in read_mlp(outer[0], within, switch)]
