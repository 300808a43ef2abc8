"""A decoder layer as branches: norm, core, norm, and how much of the result is added to the stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.step.parts import Arm, Branch, Core, Mlp, Moe, Sum
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
class SiteCore:
    """The call of a core in a recorded layer, and the calls of norms around it."""

    call: Call
    pre: tuple[Call, Norm] | None = None
    post: tuple[Call, Norm] | None = None

    @property
    def before(self) -> torch.Tensor:
        """The stream that it reads, or its norm."""
        return self.call.input if self.pre is None else self.pre[0].input

    @property
    def result(self) -> torch.Tensor:
        """What it, or the norm behind it, gives."""
        return self.call.result if self.post is None else self.post[0].result


@dataclass(frozen=True, slots=True)
class Site:
    """One branch of a recorded layer: its cores (several: their results are summed), a norm before all of them and one
    behind their sum, and the stream before and after it.

    scale, keep, renews: as in `cpu_kernels.step.parts.Branch`.
    """

    cores: tuple[SiteCore, ...]
    pre: Norm | None
    post: Norm | None
    before: torch.Tensor
    after: torch.Tensor
    scale: float
    keep: float = 1.0
    renews: bool = False

    @property
    def path(self) -> str:
        """Of its cores."""
        return ", ".join(core.call.path for core in self.cores)

    def branch(self, *cores: Core) -> Branch:
        """The branch with a core in each place."""
        arms = _arms([
            Arm(core, None if self.pre else norm_of(found.pre), norm_of(found.post) if len(self.cores) > 1 else None)
            for core, found in zip(cores, self.cores, strict=True)
        ])  # fmt: skip
        alone = len(arms) == 1 and arms[0].pre is None and arms[0].post is None
        core = arms[0].core if alone else Sum(arms)
        return Branch(core, self.pre, self.post, self.scale, self.keep, self.renews)


def norm_of(pair: tuple[Call, Norm] | None) -> Norm | None:
    """The norm of a call that was read as one."""
    return pair and pair[1]


def _arms(arms: list[Arm]) -> tuple[Arm, ...]:
    """MLPs beside routed experts are shared experts of these: they are computed at the same time."""
    plain = [arm for arm in arms if arm.pre is None and arm.post is None]
    experts = next((arm.core for arm in plain if isinstance(arm.core, Moe)), None)
    if experts is None:
        return tuple(arms)
    shared = [arm for arm in plain if isinstance(arm.core, Mlp)]
    whole = replace(experts, shared=(*experts.shared, *(arm.core for arm in shared if isinstance(arm.core, Mlp))))
    rest = [arm for arm in arms if arm not in shared]
    return tuple(replace(arm, core=whole) if arm.core is experts else arm for arm in rest)


def sites_of(trace: Trace, call: Call) -> list[Site]:
    """The branches of a layer call, in order. Raises NotCompiled for a layer of another form."""
    stream, norms, cores = call.input, {}, []
    for child in trace.children(call.path):
        norm = read_norm(child.module, stream.shape[-1])
        if norm is not None and child.input.shape[-1] == stream.shape[-1]:
            norms[child.number] = (child, norm)
        else:
            cores.append(child)
    groups, left = _groups(cores, norms), dict(norms)
    for core in (core for group in groups for core in group):
        for pair in (core.pre, core.post):
            if pair is not None:
                left.pop(pair[0].number, None)
    joined = [_joined(group, left) for group in groups]
    if left or not groups:
        names = ", ".join(child.path for child, _ in left.values()) or "no part at all"
        raise NotCompiled(f"{call.path}: it is not clear what {names} is for")
    afters = [group[0].before for group in groups[1:]] + [call.result]
    return [_site(call, *item) for item in zip(groups, joined, afters, strict=True)]


def _groups(cores: list[Call], norms: dict[int, tuple[Call, Norm]]) -> list[list[SiteCore]]:
    """Cores with the norms before and behind them; those that follow each other and read the same stream together."""
    behind: set[int] = set()
    groups: list[list[SiteCore]] = []
    for call in cores:
        free = [pair for number, pair in norms.items() if number not in behind]
        pre = next((pair for pair in free if same(pair[0].result, call.input)), None)
        post = next((pair for pair in free if pair is not pre and same(pair[0].input, call.result)), None)
        if post is not None:
            behind.add(post[0].number)
        core = SiteCore(call, pre, post)
        if groups and same(groups[-1][0].before, core.before):
            groups[-1].append(core)
        else:
            groups.append([core])
    return groups


def _joined(group: list[SiteCore], left: dict[int, tuple[Call, Norm]]) -> tuple[Call, Norm] | None:
    """The norm behind the sum of several cores, which is taken from those whose place is not known; None: there is
    none."""
    if len(group) == 1:
        return group[0].post
    total = _total(group)
    for number, (call, norm) in left.items():
        found = call.input.double()
        if (
            found.numel() == total.numel()
            and (found.reshape(total.shape) - total).norm() <= FIT_TOLERANCE * total.norm()
        ):
            left.pop(number)
            return call, norm
    return None


def _total(group: list[SiteCore]) -> torch.Tensor:
    """The sum of what cores give, float64. Raises NotCompiled where sizes differ."""
    results = [core.result for core in group]
    if any(result.numel() != results[0].numel() for result in results):
        raise NotCompiled(f"{group[0].call.path}: what is computed beside it has another size")
    return torch.stack([result.double().reshape(results[0].shape) for result in results]).sum(0)


def whole_site(core: Call) -> Site:
    """A block by itself, in a layer that is not understood: its result takes the place of its input."""
    return Site((SiteCore(core),), None, None, core.input, core.result, 1.0, keep=0.0)


def _site(layer: Call, group: list[SiteCore], post: tuple[Call, Norm] | None, after: torch.Tensor) -> Site:
    """Finds after = keep * stream + scale * result, where the stream is what it was or (it is renewed) its norm."""
    path, pre, before = group[0].call.path, group[0].pre, group[0].before
    if any(core.pre is not pre for core in group):
        pre = None
    result = post[0].result if post is not None else group[0].result if len(group) == 1 else _total(group)
    if not result.numel() == after.numel() == before.numel():
        raise NotCompiled(f"{path}: its result has another size than the stream")
    known = [1.0, *(value for value in vars(layer.module).values() if isinstance(value, float) and value > 0)]
    streams = [before] if pre is None else [before, pre[0].result]
    fits = [_fit(stream, result, after) for stream in streams]
    number = min(range(len(fits)), key=lambda number: fits[number][3])
    (keep, scale, left, _), renews = fits[number], number == 1
    factors = _nearest(known, keep), _nearest(known, scale)
    off = max(abs(one - found) / one for one, found in zip(factors, (keep, scale), strict=True))
    if left > FIT_TOLERANCE * (10 if keep == 1.0 else 1) or off > FIT_TOLERANCE:
        raise NotCompiled(f"{path}: its result is not simply added to the stream (off by {max(left, off):.2g})")
    return Site(tuple(group), norm_of(pre), norm_of(post), before, after, factors[1], factors[0], renews)


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
    """The forms that a branch with one core may have; which one it is, the comparison tells. Raises NotCompiled for
    none."""
    for core in _cores(trace, site.cores[0].call, ropes, session):
        yield site.branch(core)


def _cores(trace: Trace, call: Call, ropes: RopeTables, session: Any) -> Iterator[Core]:
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
        of_routed, of_shared = _factors(call, experts, rest, shared)
        yield Moe(
            routing.product, replace(routing.selection, scale=routing.selection.scale * of_routed), layer.spec,
            addresses, tuple(replace(mlp, scale=of_shared) for mlp in shared), routing.scaled_inputs,
        )  # fmt: skip


def _factors(call: Call, experts: Call, rest: list[Call], shared: tuple[Mlp, ...]) -> tuple[float, float]:
    """What the results of the routed and of the shared experts are multiplied with, before they are the block's: such
    numbers as the modules hold, or halves of the sum. Where no such numbers agree, each is 1."""
    if experts.result.numel() != call.result.numel():
        return 1.0, 1.0
    parts = [experts.result.double().flatten()]
    if shared:
        parts.append(_shared_result(call, rest))
    target = call.result.double().flatten()
    found = torch.linalg.lstsq(torch.stack(parts, 1), target[:, None]).solution[:, 0].tolist()
    numbers = [value for module in (call.module, experts.module) for value in vars(module).values()]
    known = [1.0, 0.5, *(float(value) for value in numbers if isinstance(value, float) and value > 0)]
    factors = [_nearest(known, value) for value in found]
    if any(abs(one - value) > FIT_TOLERANCE * one for one, value in zip(factors, found, strict=True)):
        return 1.0, 1.0
    return factors[0], factors[-1] if shared else 1.0


def _shared_result(call: Call, rest: list[Call]) -> torch.Tensor:
    """What the shared expert gives to the block's sum, float64 [rows * width]."""
    switches, outer = _switches(call, rest), _outer(call, rest)
    result = outer[0].result.double().reshape(-1, call.input.shape[-1])
    return (result * switches[0].result.double().reshape(-1, 1).sigmoid() if switches else result).flatten()


def _switches(call: Call, rest: list[Call]) -> list[Call]:
    """Linear layers of one output, which read the block's input."""
    return [
        inner for inner in rest
        if isinstance(inner.module, LINEARS) and inner.module.out_features == 1 and same(inner.input, call.input)
    ]  # fmt: skip


def _outer(call: Call, rest: list[Call]) -> list[Call]:
    """The other parts of the block, without what is inside of them."""
    switches = _switches(call, rest)
    return [
        inner for inner in rest
        if inner not in switches and not any(inner.path.startswith(f"{other.path}.") for other in rest)
    ]  # fmt: skip


def _shared(call: Call, rest: list[Call]) -> list[tuple[Mlp, ...]]:
    """The forms that the shared expert may have: none, with or without a switch."""
    switches, outer = _switches(call, rest), _outer(call, rest)
    if not outer and not switches:
        return [()]
    if len(outer) != 1 or len(switches) > 1:
        names = ", ".join(inner.path for inner in (*outer, *switches))
        raise NotCompiled(f"{call.path}: beside its experts it has {names}, expected one shared expert")
    switch: Product | None = read_linear(switches[0].module, switches[0].path) if switches else None
    within = [inner for inner in rest if inner.path.startswith(f"{outer[0].path}.")]
    return [(mlp,) for mlp in read_mlp(outer[0], within, switch)]
