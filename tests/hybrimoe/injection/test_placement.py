"""Modules on devices: what moves, what follows, and that undo gives back the same objects.

The second device is torch's `meta`: tensors really are on another device there, without an accelerator in the machine.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpu_kernels.devices import device_is_here
from hybrimoe.dense.devices import Placements, require_device, to_device
from hybrimoe.errors import DeviceError

META, CPU = torch.device("meta"), torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        assert x.device == more["bias"].device == self.inner.weight.device
        return self.norm(self.inner(x)) + more["bias"], [x]


def test_tensors_follow_into_the_module_and_back() -> None:
    block = Block()
    placements = Placements()
    placements.place("block", block, META, frozenset())
    assert {weight.device for weight in (*block.parameters(), *block.buffers())} == {META}
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # the result cannot leave meta: it was there
        block(torch.zeros(2, 4), more={"bias": torch.zeros(4)})
    result, [x] = block(torch.zeros(2, 4, device=META), more={"bias": torch.zeros(4)})
    assert result.device == x.device == META


def test_undo_gives_back_the_same_objects() -> None:
    block = Block()
    weights = {name: id(weight) for name, weight in block.named_parameters()}
    buffers = {name: id(buffer) for name, buffer in block.named_buffers()}
    placements = Placements()
    placements.place("block", block, META, frozenset())
    placements.place("block.inner", block.inner, META, frozenset())
    placements.undo()
    placements.undo()
    assert {name: id(weight) for name, weight in block.named_parameters()} == weights
    assert {name: id(buffer) for name, buffer in block.named_buffers()} == buffers
    assert "forward" not in block.__dict__
    assert placements.device_of("block") is None


def test_modules_with_a_rule_of_their_own_stay_out() -> None:
    block = Block()
    placements = Placements()
    placements.place("block", block, META, frozenset({id(block.inner)}))
    assert block.inner.weight.device == CPU
    assert block.norm.weight.device == META


def test_device_of_is_that_of_the_innermost_placed_module() -> None:
    placements = Placements()
    placements.devices = {"model": CPU, "model.layers.1": META}
    assert placements.device_of("model.layers.1.mlp.gate") == META
    assert placements.device_of("model.norm") == CPU
    assert placements.device_of("lm_head") is None


def test_only_plain_containers_are_walked() -> None:
    moved = to_device((torch.zeros(1), [torch.zeros(1)], {"a": torch.zeros(1)}, "text", None), META)
    assert [moved[0].device, moved[1][0].device, moved[2]["a"].device] == [META] * 3
    assert moved[3:] == ("text", None)


def test_devices_that_are_not_here() -> None:
    assert device_is_here(CPU)
    assert not device_is_here(torch.device("cuda:63"))
    with pytest.raises(DeviceError, match=r"r.yaml:1: the device 'cuda:63' is not here: torch finds"):
        require_device(torch.device("cuda:63"), "r.yaml:1")
