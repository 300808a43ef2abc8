"""Routers: their weights are found by shape, and how they choose by comparing all ways that the step knows with what
reaches the experts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cpu_kernels.step.products import Product
from cpu_kernels.step.router import (
    AS_SCORED,
    SIGMOID,
    SIGMOID_OF_CHOSEN,
    SOFTMAX,
    SOFTMAX_OF_CHOSEN,
    SUM_TO_ONE,
    Selection,
)
from cpu_kernels.step.stream import Norm
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.reading.parts import LINEARS, NORM_TOLERANCE, array, read_linear, read_matrix
from hybrimoe.step.trace import Call

SAMPLE_ROWS = 256
WEIGHT_TOLERANCE = 1e-4
"""Relative, of routing weights in float32 arithmetic."""
SAME_CHOICE = 0.99
"""Share of the sample rows whose experts must be the same: equal scores may fall either way."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How a block chooses experts. path: of the router. scaled_inputs: weights go to the experts' inputs instead of
    their outputs. norm: of what the router reads, its own."""

    path: str
    product: Product
    selection: Selection
    scaled_inputs: bool = False
    norm: Norm | None = None


def read_router(block: Call, experts: Call, n_experts: int, width: int, *, direct: bool = True) -> Routing:
    """Weights and choice of the router in a block that calls experts. direct: these read the block's input as it is.
    Raises NotCompiled where no way agrees."""
    name, router = _router(block, experts, n_experts, width)
    path = f"{block.path}.{name}"
    weight, bias, others = _weights(router, block.module, n_experts, width)
    product = read_matrix(weight, path, None if bias is None else array(bias))
    hidden = torch.randn(SAMPLE_ROWS, width, generator=torch.Generator().manual_seed(0))
    given = _given_to_experts(block, experts, name, hidden)
    scaled = len(given) == 1
    if scaled:
        ids, weights = _from_sorted(given[0], hidden, n_experts, path)
    else:
        ids, weights = _ids_and_weights(given, hidden, path, direct=direct)
    logits = nn.functional.linear(hidden, weight.detach().float(), None if bias is None else bias.detach().float())
    numbers = [value for module in (router, block.module) for value in vars(module).values()]
    selection = _selection(numbers, others, logits, ids, weights, f"{path} ({type(router).__name__})")
    return Routing(path, product, selection, scaled)


def _selection(
    numbers: list[Any], others: list[torch.Tensor], logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor,
    name: str,
) -> Selection:  # fmt: skip
    """The way of choosing that gives these experts and weights. Raises NotCompiled where none does."""
    for candidate in _candidates(numbers, others, logits.shape[1], ids.shape[-1]):
        found = _agreed(candidate, logits, ids, weights)
        if found is not None:
            return found
    raise NotCompiled(f"{name} chooses experts in a way that the step does not know")


def read_router_alone(router: Call, inside: list[Call], n_experts: int, width: int) -> Routing:
    """A router that is a module beside its experts, and gives their numbers and weights. inside: calls of its parts.

    Raises NotCompiled where it is none that the step knows.
    """
    module, name = router.module, f"{router.path} ({type(router.module).__name__})"
    linears = [inner for inner in inside if isinstance(inner.module, LINEARS)]
    if len(linears) != 1 or tuple(linears[0].module.weight.shape) != (n_experts, width):  # type: ignore[arg-type]
        raise NotCompiled(f"{name}: it has no single product of {n_experts} x {width}")
    hidden = torch.randn(SAMPLE_ROWS, width, generator=torch.Generator().manual_seed(0))
    twin, linear = copy.deepcopy(module).float(), linears[0]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    inner = twin.get_submodule(linear.path.removeprefix(f"{router.path}."))
    inner.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        output = twin(hidden)
    given = [value.reshape(SAMPLE_ROWS, -1) for value in output if isinstance(value, torch.Tensor)]
    ids = [value for value in given if not value.is_floating_point()]
    weights = [value for value in given if value.is_floating_point() and ids and value.shape == ids[0].shape]
    if len(seen) != 1 or len(ids) != 1 or len(weights) != 1:
        raise NotCompiled(f"{name}: it does not give experts and their weights")
    read, logits = (value.reshape(SAMPLE_ROWS, -1) for value in seen[0])
    norm = None if torch.equal(read, hidden) else _norm_like(module, hidden, read, name)
    others = [value for value in (*module.parameters(), *module.buffers()) if value.numel() == n_experts]
    selection = _selection(list(vars(module).values()), others, logits, ids[0].long(), weights[0].float(), name)
    return Routing(router.path, read_linear(linear.module, linear.path), selection, norm=norm)


def _norm_like(module: nn.Module, x: torch.Tensor, y: torch.Tensor, name: str) -> Norm:
    """The norm that makes y of x, [rows, width], whose weight may come of several factors.

    Raises NotCompiled where there is none.
    """
    parts = [value for part in module.modules() for value in vars(part).values()]
    eps = sorted({value for value in parts if isinstance(value, float) and 0 < value < 1e-2})
    for one in eps:
        plain = x / (x.pow(2).mean(-1, keepdim=True) + one).sqrt()
        weight = (plain * y).sum(0) / (plain * plain).sum(0)
        if float((plain * weight - y).abs().max()) <= NORM_TOLERANCE * float(y.abs().max()):
            return Norm(array(weight), one)
    raise NotCompiled(f"{name}: its product reads something else than a norm of its input")


def _router(block: Call, experts: Call, n_experts: int, width: int) -> tuple[str, nn.Module]:
    """The part of a block that holds a matrix [experts, width], and its name. Of several it is the one that holds no
    other matrix: a shared expert with as many columns inside as there are experts has matrices of that shape, too."""
    own = experts.path.removeprefix(f"{block.path}.").partition(".")[0]
    found = [
        (name, child) for name, child in block.module.named_children()
        if name != own and any(tuple(weight.shape) == (n_experts, width) for weight in child.parameters())
    ]  # fmt: skip
    if len(found) > 1:
        found = [(name, child) for name, child in found if sum(one.dim() == 2 for one in child.parameters()) == 1]
    if len(found) != 1:
        raise NotCompiled(
            f"{block.path}: {len(found)} of its parts have a matrix [{n_experts}, {width}], expected one router"
        )
    return found[0]


def _weights(
    router: nn.Module, block: nn.Module, n_experts: int, width: int
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """The matrix [experts, width], its bias, and what else in router or block has a value for each expert."""
    tensors: dict[str, Any] = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    matrices = {name: value for name, value in tensors.items() if tuple(value.shape) == (n_experts, width)}
    if len(matrices) != 1:
        raise NotCompiled(f"its router has {len(matrices)} matrices [{n_experts}, {width}], expected one")
    ((name, matrix),) = matrices.items()
    bias_name = f"{name.rpartition('.')[0]}.bias".lstrip(".")
    others = [value for other, value in tensors.items() if other not in (name, bias_name)]
    others += [*block.parameters(recurse=False), *block.buffers(recurse=False)]
    return matrix, tensors.get(bias_name), [value for value in others if value.numel() == n_experts]


class _Reached(Exception):
    """The experts were called: their arguments."""


class _Probe(nn.Module):
    """Stands for the experts of a block: ends its run with what they are given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises _Reached."""
        raise _Reached(*args, *kwargs.values())


class _Silent(nn.Module):
    """Stands for other parts of a block, whose results do not matter."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Zeros as large as what is given."""
        return torch.zeros_like(hidden)


def _given_to_experts(block: Call, experts: Call, router: str, hidden: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a block gives its experts for sample rows: of a copy in float32 without the large parts."""
    twin = copy.copy(block.module)
    twin.__dict__.update({table: dict(getattr(twin, table)) for table in ("_parameters", "_buffers", "_modules")})
    for table in (twin._parameters, twin._buffers):
        for name, value in table.items():
            table[name] = value.detach().float() if value is not None and value.is_floating_point() else value  # type: ignore[assignment]
    own, *inner = experts.path.removeprefix(f"{block.path}.").split(".")
    if inner:
        raise NotCompiled(f"{experts.path} is no direct part of {block.path}")
    for name, child in block.module.named_children():
        if name == own:
            continue
        large = name != router and any(isinstance(part, LINEARS) for part in child.modules())
        twin._modules[name] = _Silent() if large else copy.deepcopy(child).float()
    twin._modules[own] = _Probe()
    rows = hidden if block.input.dim() == 2 else hidden[None]
    with torch.no_grad():
        try:
            twin.forward(rows)
        except _Reached as reached:
            return [value for value in reached.args if isinstance(value, torch.Tensor)]
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise NotCompiled(f"{block.path} does not run on sample rows ({type(error).__name__}: {error})") from error
    raise NotCompiled(f"{block.path} does not call its experts for sample rows")


def _ids_and_weights(
    given: list[torch.Tensor], hidden: torch.Tensor, path: str, *, direct: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 and float32 [rows, top_k] of a common call: hidden states, experts, weights."""
    ids = [value for value in given if not value.is_floating_point()]
    if len(given) != 3 or len(ids) != 1 or given[2].shape != ids[0].shape or len(ids[0]) != len(hidden):
        raise NotCompiled(f"{path}: the experts are called in a form of their own")
    if direct and not torch.equal(given[0], hidden):
        raise NotCompiled(f"{path}: the experts read something else than the block's input")
    return ids[0].long(), given[2].float()


def _from_sorted(
    rows: torch.Tensor, hidden: torch.Tensor, n_experts: int, path: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of Llama-4's call: row e * T + t is token t times its weight for expert e, zero where that is zero."""
    if rows.shape != (n_experts * len(hidden), hidden.shape[1]):
        raise NotCompiled(f"{path}: the experts are called in a form of their own")
    factors = (rows.view(n_experts, *hidden.shape) * hidden).sum(-1) / (hidden * hidden).sum(-1)
    expected = factors[..., None] * hidden
    if float((rows.view_as(expected) - expected).abs().max()) > WEIGHT_TOLERANCE:
        raise NotCompiled(f"{path}: the experts read something else than weighted hidden states")
    top_k = int((factors != 0).sum(0).max())
    weights, ids = factors.T.topk(top_k, -1)
    return ids, weights


def _candidates(numbers: list[Any], others: list[torch.Tensor], n_experts: int, top_k: int) -> Iterator[Selection]:
    """Plain ways first. numbers: the modules' own attributes, among them those of groups and jitter."""
    groups = sorted({
        value for value in numbers
        if isinstance(value, int) and not isinstance(value, bool) and 1 < value < n_experts and n_experts % value == 0
    })  # fmt: skip
    corrections: list[np.ndarray | None] = [None, *(array(value).reshape(-1) for value in others)]
    for correction in corrections:
        for scoring, weighing in (
            (SOFTMAX, AS_SCORED), (SOFTMAX, SUM_TO_ONE), (SOFTMAX, SOFTMAX_OF_CHOSEN), (SIGMOID, AS_SCORED),
            (SIGMOID, SUM_TO_ONE), (SIGMOID, SIGMOID_OF_CHOSEN),
        ):  # fmt: skip
            plain = Selection(top_k, scoring, weighing, correction)
            yield plain
            for value in others:
                yield replace(plain, expert_scales=array(value).reshape(-1))
            for n_groups in groups:
                for top_groups in range(1, n_groups):
                    for best in (1, 2):
                        yield replace(plain, n_groups=n_groups, top_groups=top_groups, best_of_group=best)
    for value in numbers:
        if isinstance(value, float) and 0 < value < 1:
            yield Selection(top_k, jitter=value)


def _agreed(candidate: Selection, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Selection | None:
    """The candidate with the factor of its weights, where it chooses and weighs as the module does; else None."""
    own_ids, own_weights = select(candidate, logits)
    n_experts = logits.shape[1]
    mine = torch.zeros(len(logits), n_experts).scatter(1, own_ids, own_weights)
    theirs = torch.zeros(len(logits), n_experts).scatter(1, ids, weights)
    alike = ((mine != 0) == (theirs != 0)).all(-1)
    if float(alike.float().mean()) < SAME_CHOICE:
        return None
    factor = float(theirs[alike].double().sum() / mine[alike].double().sum())
    scaled = mine[alike] * factor
    if float((scaled - theirs[alike]).abs().max()) > WEIGHT_TOLERANCE * float(theirs.abs().max()):
        return None
    return replace(candidate, scale=1.0 if abs(factor - 1) < WEIGHT_TOLERANCE / 10 else factor)


def select(selection: Selection, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts int64 [rows, top_k], best first, and their weights float32, from logits float32 [rows, experts]:
    the obvious form of what `cpu_kernels.step.router` compiles."""
    if selection.jitter:
        return _mix_sparsely(selection, logits)
    scores = logits.softmax(-1) if selection.scoring == SOFTMAX else logits.sigmoid()
    choice = scores if selection.correction is None else scores + torch.as_tensor(selection.correction)
    if selection.n_groups > 1:
        groups = choice.unflatten(-1, (selection.n_groups, -1))
        best = groups.topk(min(selection.best_of_group, groups.shape[-1]), -1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(selection.top_groups, -1)[1], 1).bool()
        choice = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = choice.topk(selection.top_k, -1)[1]
    weights = scores.gather(1, ids)
    if selection.weighing == SOFTMAX_OF_CHOSEN:
        weights = logits.gather(1, ids).softmax(-1)
    elif selection.weighing == SIGMOID_OF_CHOSEN:
        weights = logits.gather(1, ids).sigmoid()
    elif selection.weighing == SUM_TO_ONE:
        weights = weights / weights.sum(-1, keepdim=True)
    if selection.expert_scales is not None:
        weights = weights * torch.as_tensor(selection.expert_scales)[ids]
    return ids, weights * selection.scale


def _mix_sparsely(selection: Selection, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    left, ids, weights = logits.clone(), [], []
    for _ in range(selection.top_k):
        top, best = left.max(-1, keepdim=True)
        near = (top - logits) / logits.abs().clamp(min=top) <= 2 * selection.jitter
        weights.append(left.masked_fill(~near, -torch.inf).softmax(-1).gather(1, best))
        ids.append(best)
        left = left.scatter(1, best, -torch.inf)
    return torch.cat(ids, -1), torch.cat(weights, -1)
