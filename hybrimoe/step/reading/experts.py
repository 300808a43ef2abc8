"""Blocks of routed experts: the router, shared experts, and what their results are multiplied with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.step.parts import Arm, Core, Mlp, Moe, Sum
from cpu_kernels.step.stream import Norm
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.reading.parts import LINEARS, read_linear, read_mlp, read_norm
from hybrimoe.step.reading.router import Routing, read_router, read_router_alone
from hybrimoe.step.trace import Call, same

NO_BETTER = 1.05
"""By how much other factors must come nearer than ones do: in bfloat16 what is left is the rounding of the sum."""


def read_experts(call: Call, experts: Call, inside: list[Call], session: Any) -> Core:
    """Router, routed experts and shared experts of a block. Raises NotCompiled for one of another form."""
    layer = _layer_of(experts, session)
    block = next((inner for inner in inside if inner.path == experts.path.rpartition(".")[0]), call)
    if not same(block.input, call.input):
        raise NotCompiled(f"{block.path}: it reads something else than {call.path}")
    around = _around(experts, inside)
    n_experts = layer.num_experts + experts.module.num_identity
    routing = read_router(block, experts, n_experts, call.input.shape[-1], direct=not around.before)
    known = (routing.path, experts.path)
    rest = [
        inner for inner in inside
        if inner is not block and inner not in around.calls and not _is_identity(inner)
        and not any(inner.path == path or inner.path.startswith(f"{path}.") for path in known)
    ]  # fmt: skip
    behind = _norm_behind(call, rest)
    if behind is not None:
        rest.remove(behind[0])
    result = call.result if behind is None else behind[0].input
    shared = _shared(call, rest)
    of_routed, of_shared = _factors(call, result, around.leave or experts, rest, shared)
    core = _moe(routing, layer, experts, session, around)
    core = replace(
        core, selection=replace(core.selection, scale=core.selection.scale * of_routed),
        shared=tuple(replace(mlp, scale=of_shared) for mlp in shared),
    )  # fmt: skip
    return core if behind is None else Sum((Arm(core, post=behind[1]),))


def read_experts_alone(
    experts: Call, router: Call, inside: list[Call], norm: Norm | None, session: Any
) -> Moe:  # fmt: skip
    """Experts that are a part of the layer, as their router is. inside: calls of the router's parts; norm: of the
    experts' input, beside the router's. Raises NotCompiled for a form that is not known."""
    layer = _layer_of(experts, session)
    n_experts = layer.num_experts + experts.module.num_identity
    routing = read_router_alone(router, inside, n_experts, experts.input.shape[-1])
    return replace(_moe(routing, layer, experts, session, _Around()), expert_norm=norm)


def _layer_of(experts: Call, session: Any) -> Any:
    """The session's layer of experts. Raises NotCompiled where the step cannot compute them."""
    module: Any = experts.module
    layer = session.layers[module.layer]
    if not isinstance(layer.backend, NumbaBackend):
        raise NotCompiled(f"{experts.path}: the experts run on the backend {getattr(layer.backend, 'name', '?')!r}")
    if layer.spec.activation.custom is not None:
        raise NotCompiled(f"{experts.path}: the experts' activation has no closed form")
    if layer.transform() is not None:
        raise NotCompiled(f"{experts.path}: a norm stands behind each expert")
    if not session.store.in_memory:
        raise NotCompiled(f"{experts.path}: experts are read from disk when they are needed")
    return layer


@dataclass(frozen=True, slots=True)
class _Around:
    """What stands around routed experts alone: a product and a norm before them, a product behind their sum."""

    enter: Call | None = None
    norm: tuple[Call, Norm] | None = None
    leave: Call | None = None

    @property
    def before(self) -> bool:
        """Whether the experts read something else than the block's input."""
        return self.enter is not None or self.norm is not None

    @property
    def calls(self) -> list[Call]:
        """All of them."""
        found = (self.enter, self.norm and self.norm[0], self.leave)
        return [call for call in found if call is not None]


def _around(experts: Call, inside: list[Call]) -> _Around:
    before = next((inner for inner in inside if _gives(inner, experts.input)), None)
    norm = None
    if before is not None and not isinstance(before.module, LINEARS):
        found = read_norm(before.module, experts.input.shape[-1])
        norm = None if found is None else (before, found)
        given = before.input
        before = next((inner for inner in inside if norm is not None and _gives(inner, given)), None)
    enter = before if before is not None and isinstance(before.module, LINEARS) else None
    leave = next(
        (inner for inner in inside if isinstance(inner.module, LINEARS) and same(inner.input, experts.result)), None
    )
    return _Around(enter, norm, leave)


def _gives(call: Call, tensor: torch.Tensor) -> bool:
    """Whether a tensor is what a call gave, and not what it was given."""
    return isinstance(call.output, torch.Tensor) and same(call.output, tensor) and not same(call.input, tensor)


def _is_identity(call: Call) -> bool:
    """Whether a part gives what it is given."""
    return isinstance(call.output, torch.Tensor) and same(call.output, call.input)


def _moe(routing: Routing, layer: Any, experts: Call, session: Any, around: _Around) -> Moe:
    module: Any = experts.module
    plain = not routing.scaled_inputs and routing.norm is None and not around.before
    if module.num_identity and not plain:
        raise NotCompiled(f"{experts.path}: experts that are the identity of something else than the block's input")
    products = [None if call is None else read_linear(call.module, call.path) for call in (around.enter, around.leave)]
    return Moe(
        routing.product, routing.selection, layer.spec, session.store.addresses(module.layer).astype("int64"),
        scaled_inputs=routing.scaled_inputs, router_norm=routing.norm, expert_norm=around.norm and around.norm[1],
        enter=products[0], leave=products[1],
    )  # fmt: skip


def _norm_behind(call: Call, rest: list[Call]) -> tuple[Call, Norm] | None:
    """The norm inside a block that gives its result."""
    for inner in rest:
        if isinstance(inner.output, torch.Tensor) and same(inner.result, call.result):
            norm = read_norm(inner.module, call.input.shape[-1])
            return None if norm is None else (inner, norm)
    return None


def _factors(
    call: Call, result: torch.Tensor, routed: Call, rest: list[Call], shared: tuple[Mlp, ...]
) -> tuple[float, float]:
    """What the results of the routed and of the shared experts are multiplied with in the block's `result`: numbers
    that the modules hold, or halves; those that come nearest, and 1 where they are no better."""
    if routed.result.numel() != result.numel():
        return 1.0, 1.0
    parts = [routed.result.double().flatten()]
    if shared:
        parts.append(_shared_result(call, rest))
    target = result.double().flatten()
    numbers = [value for module in (call.module, routed.module) for value in vars(module).values()]
    known = sorted({1.0, 0.5, *(float(value) for value in numbers if isinstance(value, float) and value > 0)})
    pairs = [(1.0, 1.0), *product(known, known if shared else [1.0])]
    off = [float((target - sum(f * part for f, part in zip(pair, parts, strict=False))).norm()) for pair in pairs]
    best = min(range(len(pairs)), key=lambda number: off[number])
    return pairs[0] if off[0] <= NO_BETTER * off[best] else pairs[best]


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


def _shared(call: Call, rest: list[Call]) -> tuple[Mlp, ...]:
    """The shared expert, with or without a switch, or none."""
    switches, outer = _switches(call, rest), _outer(call, rest)
    if not outer and not switches:
        return ()
    if len(outer) != 1 or len(switches) > 1:
        names = ", ".join(inner.path for inner in (*outer, *switches))
        raise NotCompiled(f"{call.path}: beside its experts it has {names}, expected one shared expert")
    switch = read_linear(switches[0].module, switches[0].path) if switches else None
    within = [inner for inner in rest if inner.path.startswith(f"{outer[0].path}.")]
    return (read_mlp(outer[0], within, switch),)
