"""A decoder layer as branches: norm, core, norm, and how much of the result is added to the stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from cpu_kernels.step.parts import Arm, Branch, Core, Mlp, Moe, Sum
from cpu_kernels.step.stream import Norm
from hybrimoe.experts.module import HybridExperts
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.reading.attention import RopeTables, cache_number, read_attention
from hybrimoe.step.reading.experts import read_experts, read_experts_alone
from hybrimoe.step.reading.parts import FIT_TOLERANCE, nearest, read_mlp, read_norm
from hybrimoe.step.reading.states import read_state_layer
from hybrimoe.step.trace import Call, Trace, same


@dataclass(frozen=True, slots=True)
class SiteCore:
    """The call of a core in a recorded layer, and the calls of norms around it. router: where the core is experts by
    themselves, the call that chose them."""

    call: Call
    pre: tuple[Call, Norm] | None = None
    post: tuple[Call, Norm] | None = None
    router: Call | None = None

    @property
    def before(self) -> torch.Tensor:
        """The stream that it reads, or its norm."""
        return self.call.input if self.pre is None else self.pre[0].input

    @property
    def own_pre(self) -> tuple[Call, Norm] | None:
        """The norm before the whole core: that of experts by themselves is not before their router."""
        return self.pre if self.router is None else None

    def alone(self) -> Site:
        """The core by itself: its result takes the place of what it reads."""
        before = self.call.input if self.router is None else self.before
        return Site(
            (replace(self, pre=None if self.router is None else self.pre, post=None),),
            None,
            None,
            before,
            self.call.result,
            1.0,
            keep=0.0,
        )

    @property
    def result(self) -> torch.Tensor:
        """What it, or the norm behind it, gives."""
        return self.call.result if self.post is None else self.post[0].result


@dataclass(frozen=True, slots=True)
class Site:
    """One branch of a recorded layer: its cores (several: their results are summed), a norm before all of them and one
    behind their sum, and the stream before and after it.

    scale, keep, renews: as in `cpu_kernels.step.parts.Branch`. late: cores whose results are in no sum here. taken: the
    sum of late results before, where it is added here.
    """

    cores: tuple[SiteCore, ...]
    pre: Norm | None
    post: Norm | None
    before: torch.Tensor
    after: torch.Tensor
    scale: float
    keep: float = 1.0
    renews: bool = False
    late: tuple[SiteCore, ...] = ()
    taken: torch.Tensor | None = None

    @property
    def path(self) -> str:
        """Of its cores."""
        return ", ".join(core.call.path for core in self.cores)

    def branch(self, *cores: Core) -> Branch:
        """The branch with a core in each place."""
        several = len(self.cores) > 1
        arms = _arms([
            Arm(core, None if self.pre else norm_of(found.own_pre), norm_of(found.post) if several else None,
                found in self.late)
            for core, found in zip(cores, self.cores, strict=True)
        ])  # fmt: skip
        alone = len(arms) == 1 and arms[0].pre is None and arms[0].post is None and not arms[0].late
        core = arms[0].core if alone else Sum(arms)
        return Branch(core, self.pre, self.post, self.scale, self.keep, self.renews)


def norm_of(pair: tuple[Call, Norm] | None) -> Norm | None:
    """The norm of a call that was read as one."""
    return pair and pair[1]


def _arms(arms: list[Arm]) -> tuple[Arm, ...]:
    """MLPs beside routed experts are shared experts of these: they are computed at the same time."""
    plain = [arm for arm in arms if arm.pre is None and arm.post is None and not arm.late]
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
    groups, left = _groups(cores, norms, _routers(trace, call)), dict(norms)
    for core in (core for group in groups for core in group):
        for pair in (core.pre, core.post):
            if pair is not None:
                left.pop(pair[0].number, None)
    joined = [_joined(group, left) for group in groups]
    if left or not groups:
        names = ", ".join(child.path for child, _ in left.values()) or "no part at all"
        raise NotCompiled(f"{call.path}: it is not clear what {names} is for")
    afters = [group[0].before for group in groups[1:]] + [call.result]
    sites, late = [], list[SiteCore]()
    for group, post, after in zip(groups, joined, afters, strict=True):
        site = _placed(call, group, post, after, late)
        late = [*(late if site.taken is None else []), *site.late]
        sites.append(site)
    if late:
        raise NotCompiled(f"{late[0].call.path}: its result is added nowhere")
    return sites


def _placed(
    layer: Call, group: list[SiteCore], post: tuple[Call, Norm] | None, after: torch.Tensor, late: list[SiteCore]
) -> Site:  # fmt: skip
    """The branch of a group: the sum of all, with the late results before it, or without one that is late itself."""
    ways: list[tuple[list[SiteCore], list[SiteCore]]] = [(group, [])]
    if late:
        ways.append((group, late))
    if len(group) > 1:
        ways += [([other for other in group if other is not core], []) for core in group]
    problem: NotCompiled | None = None
    for summed, taken in ways:
        try:
            return _site(layer, group, summed, taken, post, after)
        except NotCompiled as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _routers(trace: Trace, call: Call) -> dict[int, Call]:
    """By number of a call of experts that are parts of the layer itself: the part that chose them."""
    found, parts = {}, trace.children(call.path)
    for experts in parts:
        if isinstance(experts.module, HybridExperts):
            given = [value for value in (*experts.args, *experts.kwargs.values()) if isinstance(value, torch.Tensor)]
            ids = [value for value in given if not value.is_floating_point()]
            for part in parts:
                outputs = part.output if isinstance(part.output, tuple | list) else ()
                if any(value is one for value in outputs for one in ids):
                    found[experts.number] = part
    return found


def _groups(
    cores: list[Call], norms: dict[int, tuple[Call, Norm]], routers: dict[int, Call]
) -> list[list[SiteCore]]:  # fmt: skip
    """Cores with the norms before and behind them; those that follow each other and read the same stream together."""
    behind: set[int] = set()
    groups: list[list[SiteCore]] = []
    for call in (call for call in cores if call not in routers.values()):
        free = [pair for number, pair in norms.items() if number not in behind]
        pre = next((pair for pair in free if same(pair[0].result, call.input)), None)
        post = next((pair for pair in free if pair is not pre and same(pair[0].input, call.result)), None)
        if post is not None:
            behind.add(post[0].number)
        core = SiteCore(call, pre, post, routers.get(call.number))
        if core.router is not None and not same(core.router.input, core.before):
            raise NotCompiled(f"{core.router.path}: it reads another stream than {call.path}")
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
    return SiteCore(core).alone()


def _site(
    layer: Call, group: list[SiteCore], summed: list[SiteCore], taken: list[SiteCore], post: tuple[Call, Norm] | None,
    after: torch.Tensor,
) -> Site:  # fmt: skip
    """Finds after = keep * stream + scale * result + taken, where the stream is what it was or (it is renewed) its
    norm, and the result that of the `summed` ones of a group."""
    path, pre, before = group[0].call.path, group[0].own_pre, group[0].before
    if any(core.own_pre is not pre for core in group):
        pre = None
    result = post[0].result if post is not None else summed[0].result if len(summed) == 1 else _total(summed)
    others = _total(taken) if taken else None
    if others is not None and others.numel() != after.numel():
        raise NotCompiled(f"{path}: what is added beside it has another size")
    if not result.numel() == after.numel() == before.numel():
        raise NotCompiled(f"{path}: its result has another size than the stream")
    values = [*vars(layer.module).values(), *_single_values(layer.module)]
    known = [1.0, *(value for value in values if isinstance(value, float) and value > 0)]
    streams = [before] if pre is None else [before, pre[0].result]
    target = after if others is None else after.double() - others.reshape(after.shape)
    fits = [_fit(stream, result, target) for stream in streams]
    number = min(range(len(fits)), key=lambda number: fits[number][3])
    (keep, scale, left, _), renews = fits[number], number == 1
    factors = nearest(known, keep), nearest(known, scale)
    off = max(abs(one - found) / one for one, found in zip(factors, (keep, scale), strict=True))
    if left > FIT_TOLERANCE * (10 if keep == 1.0 else 1) or off > FIT_TOLERANCE:
        raise NotCompiled(f"{path}: its result is not simply added to the stream (off by {max(left, off):.2g})")
    late = tuple(core for core in group if core not in summed)
    return Site(tuple(group), norm_of(pre), norm_of(post), before, after, factors[1], factors[0], renews, late, others)


def _single_values(module: torch.nn.Module) -> list[float]:
    """Those of a layer's own parameters and buffers that are one number."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return [float(tensor) for tensor in tensors if tensor.numel() == 1]


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
    core = site.cores[0]
    if core.router is not None:
        inside = list(trace.within(core.router.path))
        yield site.branch(read_experts_alone(core.call, core.router, inside, norm_of(core.pre), session))
        return
    for form in _cores(trace, core.call, ropes, session):
        yield site.branch(form)


def _cores(trace: Trace, call: Call, ropes: RopeTables, session: Any) -> Iterator[Core]:
    inside = list(trace.within(call.path))
    experts = [inner for inner in inside if isinstance(inner.module, HybridExperts)]
    if experts:
        yield read_experts(call, experts[0], inside, session)
    elif any(value is trace.cache for value in (*call.args, *call.kwargs.values())):
        cache = cache_number(call)
        if cache in trace.states:
            yield from read_state_layer(trace, call, cache)
        else:
            yield from read_attention(trace, call, ropes)
    else:
        yield read_mlp(call, inside)
