"""A decoder layer as branches: norm, core, norm, and how much of the result is added to the stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.step.parts import Attention, Branch, Mlp, Moe
from cpu_kernels.step.products import Product
from cpu_kernels.step.stream import Norm
from hybrimoe.experts.module import HybridExperts
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.read_attention import RopeTables, read_attention
from hybrimoe.step.read_parts import LINEARS, read_linear, read_mlp, read_norm
from hybrimoe.step.read_router import read_router
from hybrimoe.step.trace import Call, Trace, same

FIT_TOLERANCE = 2e-2
"""Relative, of the factor of a branch that is found from bfloat16 values; float32 ones agree to 1e-5."""


@dataclass(frozen=True, slots=True)
class Site:
    """One branch of a recorded layer: the call of its core, its norms, and the stream before and after it."""

    core: Call
    pre: Norm | None
    post: Norm | None
    result: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    scale: float


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


def _site(
    layer: Call, core: Call, pre: tuple[Call, Norm] | None, post: tuple[Call, Norm] | None, before: torch.Tensor,
    after: torch.Tensor,
) -> Site:  # fmt: skip
    result = core.result if post is None else post[0].result
    x, y = result.double().flatten(), (after.double() - before.double()).flatten()
    if x.shape != y.shape:
        raise NotCompiled(f"{core.path}: its result has another size than the stream")
    factor = float(x @ y / (x @ x + 1e-300))
    left = float((y - factor * x).norm() / (y.norm() + 1e-300))
    known = [1.0, *(value for value in vars(layer.module).values() if isinstance(value, float) and value > 0)]
    nearest = min(known, key=lambda value: abs(value - factor))
    if left > 10 * FIT_TOLERANCE or abs(nearest - factor) > FIT_TOLERANCE * nearest:
        raise NotCompiled(f"{core.path}: its result is not simply added to the stream (factor {factor:.4g})")
    return Site(core, pre[1] if pre else None, post[1] if post else None, result, before, after, nearest)


def branches_of(trace: Trace, site: Site, ropes: RopeTables, session: Any) -> Iterator[Branch]:
    """The forms that a branch may have; which one it is, the comparison tells. Raises NotCompiled for none."""
    for core in _cores(trace, site.core, ropes, session):
        yield Branch(core, site.pre, site.post, site.scale)


def _cores(trace: Trace, call: Call, ropes: RopeTables, session: Any) -> Iterator[Attention | Mlp | Moe]:
    inside = list(trace.within(call.path))
    experts = [inner for inner in inside if isinstance(inner.module, HybridExperts)]
    if experts:
        yield from _moe(call, experts[0], inside, session)
    elif any(value is trace.cache for value in (*call.args, *call.kwargs.values())):
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
    given = (*experts.args, *experts.kwargs.values())
    if len(given) != 3:
        raise NotCompiled(f"{experts.path}: the experts are called in a form of their own")
    _, index, _ = given
    router = _router_call(call, index, inside)
    width = call.input.shape[-1]
    product, selection = read_router(router, layer.num_experts, width, index.shape[-1])
    if not same(experts.input, call.input) or not same(router.input, call.input):
        raise NotCompiled(f"{call.path}: router or experts read something else than the block's input")
    addresses = session.store.addresses(module.layer).astype("int64")
    rest = [
        inner for inner in inside
        if inner.path != router.path and not inner.path.startswith((f"{router.path}.", f"{experts.path}."))
        and inner.path != experts.path
    ]  # fmt: skip
    for shared in _shared(call, rest):
        yield Moe(product, selection, layer.spec, addresses, shared)


def _router_call(call: Call, index: torch.Tensor, inside: list[Call]) -> Call:
    """The module whose outputs are the experts that were asked for."""
    for inner in inside:
        outputs = inner.output if isinstance(inner.output, tuple | list) else (inner.output,)
        if any(isinstance(value, torch.Tensor) and same(value, index) for value in outputs):
            return inner
    raise NotCompiled(f"{call.path}: no module of its own chooses the experts")


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
