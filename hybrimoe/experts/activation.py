"""Recognises what the gate of an experts module computes, by probing it.

The families of transformers write the same few gated units in many ways (act(g) * u, clamped before or after the
activation, up shifted by one, ...), with constants from their configuration. Rather than a table of class names, the
module's own `_apply_gate` (or `act_fn`, where there is no gate) is evaluated on a grid of gate and up values that
reaches beyond each constant found on it, and compared with every closed form that the kernels have. The first that
agrees everywhere is the answer, so a wrong recognition would need a function which differs nowhere on the grid.
A gate that agrees with none is kept as a callable: correct, and slower than a closed form.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, product

import torch
from torch import nn

from cpu_kernels import Activation, apply_activation
from cpu_kernels.format.spec import ActivationKind
from hybrimoe.errors import UnsupportedExpertsError

KINDS: tuple[ActivationKind, ...] = ("silu", "gelu_tanh", "gelu", "relu2", "relu", "identity", "sigmoid")
QUICK_GELU_ALPHA = 1.702  # gelu(x) ~ x * sigmoid(1.702 x): transformers' QuickGELUActivation
RELATIVE_TOLERANCE, INPUT_TOLERANCE = 2e-5, 1e-6  # float32 evaluation order; gelu and its tanh form differ by 5e-4
PROBE_DECADES = (-3.0, 4.0)  # magnitudes 1e-3 .. 1e4
PROBES_PER_SIGN = 48
PROBE_SEED = 20250408


class GateFunction:
    """A module's own gate without its weights: callable on [..., 2I] (gate, then up), or [..., I] where not gated.

    Compares equal to the gate of another layer of the same class and constants, so that layers share one ExpertSpec.
    """

    def __init__(self, module: nn.Module, gated: bool, concatenated: bool) -> None:
        self._shell = _without_weights(module)
        self._act_on: dict[torch.device, nn.Module] = {}
        """Copies of the activation's own weights, for devices on which the module's activation is not."""
        self._gated, self._concatenated = gated, concatenated
        self._key = (type(module), gated, concatenated, repr(sorted(_constants(module).items())), repr(_act(module)))

    def __call__(self, first: torch.Tensor) -> torch.Tensor:
        shell = self._shell_on(first.device)
        if not self._gated:
            return shell.act_fn(first)  # type: ignore[operator, no-any-return]
        if not self._concatenated:
            first = torch.stack(first.chunk(2, dim=-1), dim=-1).flatten(-2)
        if not hasattr(shell, "_apply_gate"):
            gate, up = first.chunk(2, dim=-1)
            return shell.act_fn(gate) * up  # type: ignore[operator, no-any-return]
        return shell._apply_gate(first)  # type: ignore[operator, no-any-return]

    def _shell_on(self, device: torch.device) -> nn.Module:
        """The module's shell with its activation on `device`: both the CPU and an accelerator compute experts."""
        act = self._shell._modules.get("act_fn")
        weight = None if act is None else next(act.parameters(), None)
        if act is None or weight is None or weight.device == device:
            return self._shell
        if device not in self._act_on:
            there = {id(tensor): tensor.detach().to(device) for tensor in (*act.parameters(), *act.buffers())}
            self._act_on[device] = copy.deepcopy(act, there)
        shell = copy.copy(self._shell)
        shell._modules = {"act_fn": self._act_on[device]}
        return shell

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GateFunction) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"GateFunction({self._key[0].__name__})"


_recognised: dict[GateFunction, Activation] = {}


def recognise_activation(module: nn.Module, *, gated: bool, concatenated: bool) -> Activation:
    """The closed form of the module's gate, or Activation(kind="custom") around the module's own code.

    Raises UnsupportedExpertsError where the activation has weights of its own that are not loaded yet.
    """
    own = GateFunction(module, gated, concatenated)
    if own not in _recognised:
        _refuse_unloaded(module)
        _recognised[own] = _recognise(module, own, gated)
    return _recognised[own]


def _recognise(module: nn.Module, own: GateFunction, gated: bool) -> Activation:
    found = recognise_function(own, _constants(module).values(), gated=gated)
    return found or Activation(kind="custom", gated=gated, custom=own)


def recognise_function(
    own: Callable[[torch.Tensor], torch.Tensor],
    constants: Iterable[float],
    *,
    gated: bool,
    likely: Iterable[Activation] = (),
) -> Activation | None:
    """The closed form of a function of [n, 2] (gate and up; or [n, 1]) to [n, 1], None where it has none here.

    constants: limits and slopes that it may have. likely: forms that are tried first.
    """
    numbers = sorted({value for value in constants if 0 < value < math.inf})
    gate, up = probe_grid(numbers, gated)
    expected = _evaluate(own, gate, up, gated)
    for candidate in chain(likely, _candidates(numbers, gated)):
        if agrees(apply_activation(candidate, gate if gated else None, up), expected, gate, up):
            return candidate
    return None


def agrees(found: torch.Tensor, expected: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> bool:
    """True where the two differ by no more than float32 evaluation, everywhere (a gate's tail is a difference, so the
    error is relative to its inputs too)."""
    scale = (1 + gate.abs()) * (1 + up.abs())
    allowed = RELATIVE_TOLERANCE * expected.abs() + INPUT_TOLERANCE * scale
    return bool(((found - expected).abs() <= allowed).all())


def probe_grid(constants: list[float], gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up values float32 [n]: all pairs of log-spaced magnitudes of both signs, and points round constants."""
    decades = torch.logspace(*PROBE_DECADES, PROBES_PER_SIGN)
    edges = torch.tensor([c * f for c in constants for f in (0.5, 0.99, 1.01, 2.0)], dtype=torch.float32)
    uniform = 8 * torch.rand(PROBES_PER_SIGN, generator=torch.Generator().manual_seed(PROBE_SEED))
    magnitudes = torch.cat([decades, edges, uniform])
    values = torch.cat([-magnitudes, torch.zeros(1), magnitudes])
    if not gated:
        return values, values
    pairs = torch.cartesian_prod(values, values)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def _evaluate(
    own: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor, gated: bool
) -> torch.Tensor:
    first = torch.stack([gate, up], dim=-1) if gated else up[:, None]
    with torch.no_grad():
        return own(first)[:, 0].float()


def _candidates(constants: list[float], gated: bool) -> Iterator[Activation]:
    """Closed forms, plain ones first; limits and slopes are taken from the module's own constants."""
    forms: list[tuple[ActivationKind, float]] = [(kind, 1.0) for kind in KINDS]
    forms += [("silu", alpha) for alpha in (QUICK_GELU_ALPHA, *constants)]
    for kind, alpha in forms:
        yield Activation(kind=kind, gated=gated, alpha=alpha)
    if not gated:
        return
    for limit, (kind, alpha), offset in product(constants, forms, (0.0, 1.0)):
        for before, after, up in ((1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
            yield Activation(
                kind=kind,
                alpha=alpha,
                gate_max=limit if before else None,
                act_max=limit if after else None,
                up_limit=limit if up else None,
                up_offset=offset,
            )


def _act(module: nn.Module) -> object:
    act = getattr(module, "act_fn", None)
    return act if act is None or isinstance(act, nn.Module) else getattr(act, "__qualname__", repr(act))


def _constants(module: nn.Module) -> dict[str, float]:
    """Plain numbers on the module and its activation: limits, slopes, caps."""
    constants: dict[str, float] = {}
    act = getattr(module, "act_fn", None)
    for prefix, owner in (("", module), *(act.named_modules() if isinstance(act, nn.Module) else ())):
        for name, value in vars(owner).items():
            if isinstance(value, float):
                constants[f"{prefix}.{name}"] = value
    return constants


def _without_weights(module: nn.Module) -> nn.Module:
    """A shallow copy that keeps methods, constants and the activation but no parameter of the experts."""
    shell = copy.copy(module)
    shell._parameters, shell._buffers = {}, {}
    shell._modules = {name: child for name, child in module._modules.items() if name == "act_fn"}
    return shell


def _refuse_unloaded(module: nn.Module) -> None:
    act = getattr(module, "act_fn", None)
    if isinstance(act, nn.Module) and any(parameter.is_meta for parameter in act.parameters()):
        raise UnsupportedExpertsError(
            f"{type(module).__name__}: its activation {type(act).__name__} has trained weights that are not loaded yet;"
            " load the model with transformers and use hybrimoe.inject"
        )
