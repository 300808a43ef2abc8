"""MLPs are recognised by what their own forward computes, over values far beyond those that a step shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cpu_kernels.format.spec import Activation
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.reading.parts import read_mlp
from hybrimoe.step.trace import Call

WIDTH, INTER = 12, 20
Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class OwnMlp(nn.Module):
    """An MLP around a function of gate and up; `fused`: both are columns of one product."""

    def __init__(self, function: Gate, *, fused: bool, gate_last: bool = False, limit: float | None = None) -> None:
        super().__init__()
        self.function, self.gate_last = [function], gate_last
        if limit is not None:
            self.limit = limit
        self.one = nn.Linear(WIDTH, (2 if fused else 1) * INTER, bias=False)
        self.other = None if fused else nn.Linear(WIDTH, INTER, bias=False)
        self.down = nn.Linear(INTER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.one(x).chunk(2, -1) if self.other is None else (self.one(x), self.other(x))
        gate, up = (other, one) if self.gate_last else (one, other)
        result: torch.Tensor = self.down(self.function[0](gate, up))
        return result


class Ungated(nn.Module):
    """Two products with a function between them."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = [function]
        self.up, self.down = nn.Linear(WIDTH, INTER), nn.Linear(INTER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.function[0](self.up(x)))
        return result


def calls_of(module: nn.Module) -> tuple[Call, list[Call]]:
    """A recorded call of an MLP on small values, and those inside."""
    calls: list[Call] = []

    def hook(path: str) -> Callable[..., None]:
        return lambda own, args, output: calls.append(Call(len(calls), path, own, args, {}, output))

    for name, child in module.named_children():
        child.register_forward_hook(hook(f"mlp.{name}"))
    x = torch.randn(1, 4, WIDTH) / 10
    with torch.no_grad():
        output = module(x)
    return Call(len(calls), "mlp", module, (x,), {}, output), calls


def oai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


GATES: dict[str, tuple[Gate, float | None, Activation]] = {
    "silu": (lambda gate, up: F.silu(gate) * up, None, Activation("silu")),
    "gelu": (lambda gate, up: F.gelu(gate, approximate="tanh") * up, None, Activation("gelu_tanh")),
    "clamped": (
        lambda gate, up: F.silu(gate).clamp(max=3.0) * up.clamp(-3.0, 3.0), 3.0,
        Activation("silu", act_max=3.0, up_limit=3.0),
    ),
    "gpt-oss": (oai, 7.0, Activation("silu", alpha=1.702, gate_max=7.0, up_limit=7.0, up_offset=1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("gate_last", [False, True])
def test_gated(name: str, *, fused: bool, gate_last: bool) -> None:
    function, limit, expected = GATES[name]
    module = OwnMlp(function, fused=fused, gate_last=gate_last and not fused, limit=limit)
    mlp = read_mlp(*calls_of(module))
    assert mlp.activation == expected
    assert mlp.fused is fused
    if not fused:
        assert module.other is not None
        assert mlp.gate is not None
        gate = module.other if gate_last else module.one
        assert mlp.gate.address == gate.weight.data_ptr() != mlp.up.address


def test_ungated() -> None:
    mlp = read_mlp(*calls_of(Ungated(lambda x: F.relu(x) ** 2)))
    assert (mlp.activation, mlp.gate, mlp.fused) == (Activation("relu2", gated=False), None, False)


UNKNOWN: dict[str, Gate] = {
    "a limit that no value of a step reaches": lambda gate, up: F.silu(gate.clamp(max=50.0)) * up,
    "a limit of the result": lambda gate, up: (F.silu(gate) * up).clamp(-900.0, 900.0),
    "another function": lambda gate, up: torch.tanh(gate) * up,
    "more than the product": lambda gate, up: F.silu(gate) * up + 1e-3 * up,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_closed_form_is_refused(name: str) -> None:
    with pytest.raises(NotCompiled, match="no closed form"):
        read_mlp(*calls_of(OwnMlp(UNKNOWN[name], fused=False)))
