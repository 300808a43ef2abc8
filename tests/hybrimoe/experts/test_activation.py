"""The gate of an experts module is recognised by value; what no closed form covers is kept as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from cpu_kernels import Activation, apply_activation
from hybrimoe.errors import UnsupportedExpertsError
from hybrimoe.experts.activation import GateFunction, recognise_activation


class Gate(nn.Module):
    """The part of an experts module that matters here."""

    def __init__(self, act: str = "silu", **constants: float) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))
        self.act_fn = ACT2FN[act]
        for name, value in constants.items():
            setattr(self, name, value)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class ClampedBefore(Gate):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


class ClampedAfter(Gate):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


class HiddenConstant(Gate):
    """A limit that is written in the code, not on the module: no closed form can be found for it."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=123.0)) * up


class Interleaved(Gate):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return self.act_fn(gate.clamp(max=self.limit)) * (up.clamp(-self.limit, self.limit) + 1)


def recognise(module: nn.Module, gated: bool = True, concatenated: bool = True) -> Activation:
    return recognise_activation(module, gated=gated, concatenated=concatenated)


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("silu", Activation("silu")),
        ("swish", Activation("silu")),
        ("gelu", Activation("gelu")),
        ("gelu_new", Activation("gelu_tanh")),
        ("gelu_pytorch_tanh", Activation("gelu_tanh")),
        ("relu", Activation("relu")),
        ("relu2", Activation("relu2")),
        ("sigmoid", Activation("sigmoid")),
        ("linear", Activation("identity")),
        ("quick_gelu", Activation("silu", alpha=1.702)),
    ],
)
def test_plain_gates(act: str, expected: Activation) -> None:
    assert recognise(Gate(act)) == expected


def test_clamps_before_and_after_the_activation_are_told_apart() -> None:
    before, after = recognise(ClampedBefore(limit=10.0)), recognise(ClampedAfter(limit=10.0))
    assert before == Activation("silu", gate_max=10.0, up_limit=10.0)
    assert after == Activation("silu", act_max=10.0, up_limit=10.0)


def test_an_infinite_limit_is_no_limit() -> None:
    assert recognise(ClampedAfter(limit=float("inf"))) == Activation("silu")


def test_interleaved_gate_with_shifted_up() -> None:
    expected = Activation("silu", gate_max=7.0, up_limit=7.0, up_offset=1.0)
    assert recognise(Interleaved(limit=7.0), concatenated=False) == expected


@pytest.mark.parametrize("act", ["mish", "tanh", "hardswish"])
def test_an_unknown_activation_runs_as_the_modules_own_code(act: str) -> None:
    module = Gate(act)
    activation = recognise(module)
    assert activation.kind == "custom"
    gate, up = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(apply_activation(activation, gate, up), module.act_fn(gate) * up, rtol=0, atol=0)


def test_a_limit_hidden_in_the_code_is_not_missed() -> None:
    assert recognise(HiddenConstant()).kind == "custom"


def test_an_ungated_expert() -> None:
    assert recognise(Gate("relu2"), gated=False) == Activation("relu2", gated=False)
    custom = recognise(Gate("mish"), gated=False)
    assert (custom.kind, custom.gated) == ("custom", False)
    torch.testing.assert_close(apply_activation(custom, None, torch.ones(3)), ACT2FN["mish"](torch.ones(3)))


def test_a_kept_gate_holds_no_weights_and_equals_that_of_another_layer() -> None:
    first, second = GateFunction(Gate("mish"), True, True), GateFunction(Gate("mish"), True, True)
    assert first == second
    assert hash(first) == hash(second)
    assert first != GateFunction(ClampedBefore("mish", limit=3.0), True, True)
    assert ClampedBefore("mish", limit=3.0).limit == 3.0
    assert not list(first._shell.parameters())


def test_gates_with_different_constants_are_different() -> None:
    assert recognise(ClampedBefore("mish", limit=3.0)) != recognise(ClampedBefore("mish", limit=4.0))


def test_an_activation_with_weights_that_are_not_loaded_is_refused() -> None:
    with torch.device("meta"):
        module = Gate("prelu")
    with pytest.raises(UnsupportedExpertsError, match="trained weights that are not loaded"):
        recognise(module)
