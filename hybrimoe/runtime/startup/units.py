"""The accelerators of a session, and which layers and slots each of them has.

Each accelerator owns a contiguous block of layers (`scheduler.planner.layer_blocks`): all their experts' slots, their
transfers and their computations. Blocks are in proportion to what the devices have free; equal where that is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gpu_kernels import Accelerator
from hybrimoe.amounts import parse_amount
from hybrimoe.errors import ConfigError
from hybrimoe.runtime.layer_call.layers import Layer
from hybrimoe.runtime.startup.budget import auto_slots, reserve_bytes
from scheduler import DemandError
from scheduler.planner.layer_blocks import Block, joined, layers_of, slots_of


@dataclass(frozen=True, slots=True)
class Unit:
    """One accelerator and its layers. `index` is its place in the list; `unit` of timelines and statistics."""

    index: int
    accelerator: Accelerator
    layers: range


def share_layers(
    layers: Sequence[Layer], accelerators: Sequence[Accelerator], model: nn.Module | None, kv_reserve_bytes: int | None
) -> list[Unit]:
    """Gives each accelerator its layers. Raises ConfigError where there are more accelerators than layers."""
    if not accelerators:
        return []
    reserves = _reserves(accelerators, layers, model, kv_reserve_bytes)
    rooms = [
        None if (free := accelerator.free_bytes()) is None else float(max(free - reserve, 0))
        for accelerator, reserve in zip(accelerators, reserves, strict=True)
    ]
    shares = [1.0 if None in rooms or room is None else room for room in rooms]
    try:
        counts = layers_of(_slotted(layers), shares)
    except DemandError as error:
        raise ConfigError(f"accelerator: {error}; list fewer of them") from error
    ends = [sum(counts[: at + 1]) for at in range(len(counts))]
    return [
        Unit(index, accelerator, range(end - count, end))
        for index, (accelerator, count, end) in enumerate(zip(accelerators, counts, ends, strict=True))
    ]


def slots_by_unit(
    setting: int | float | str, units: Sequence[Unit], layers: Sequence[Layer], slot_bytes: int,
    model: nn.Module | None, kv_reserve_bytes: int | None,
) -> list[int]:  # fmt: skip
    """Slots of each accelerator: "auto" fits each device by itself, everything else is a total that they share.

    Sizes and shares are caps; a count above the number of experts is an error. Raises BudgetError for that, for a size
    below one expert, and for an automatic budget that cannot hold one; ConfigError for what is no amount.
    """
    n_experts = _slotted(layers)
    if not units or not sum(n_experts):
        return [0] * len(units)
    if setting != "auto":
        total = parse_amount(setting).to_experts(sum(n_experts), slot_bytes, auto=0)
        return slots_of(n_experts, [len(unit.layers) for unit in units], total)
    reserves = _reserves([unit.accelerator for unit in units], layers, model, kv_reserve_bytes)
    return [
        auto_slots(sum(n_experts[layer] for layer in unit.layers), slot_bytes, unit.accelerator, reserve)
        for unit, reserve in zip(units, reserves, strict=True)
    ]


def blocks_of(units: Sequence[Unit]) -> list[Block]:
    """Layers and slots of each accelerator as they are now, for the planner."""
    return joined([len(unit.layers) for unit in units], [unit.accelerator.n_slots for unit in units])


def _slotted(layers: Sequence[Layer]) -> list[int]:
    """Experts of each layer that may have a slot."""
    return [0 if layer.placement == "cpu" else layer.num_experts for layer in layers]


def _reserves(
    accelerators: Sequence[Accelerator], layers: Sequence[Layer], model: nn.Module | None, kv_reserve_bytes: int | None
) -> list[int]:
    """Bytes that slots must leave on each device; the model's dense part and KV cache are on the first one."""
    first, *others = accelerators
    specs = {layer.spec for layer in layers if layer.placement != "cpu"}
    on_first = reserve_bytes(model, first, kv_reserve_bytes, specs)
    return [on_first, *(reserve_bytes(None, other, 0, specs) for other in others)]
