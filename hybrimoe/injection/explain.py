"""Says which rule is for which module of a model, with operator, device and bytes; no weights are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast, get_args

import torch
from torch import nn

from cpu_kernels import ExpertDtype
from gpu_kernels.devices import auto_device, indexed, memory_info
from hybrimoe.injection.operators import DefaultKwargs, ExpertsKwargs
from hybrimoe.injection.resolve import Hit, Resolution, claimed_modules, resolve
from hybrimoe.injection.rules import RulesSource, read_rules
from hybrimoe.runtime.config import RuntimeConfig
from hybrimoe.runtime.startup.backends import require_devices
from hybrimoe.runtime.startup.budget import PlannedMemory, beside_slots, kv_cache_bytes, slots_asked_for
from scheduler.planner.layer_blocks import layers_of, slots_of

DTYPES: tuple[ExpertDtype, ...] = get_args(ExpertDtype)


@dataclass(frozen=True, slots=True)
class Row:
    """One module with a rule.

    device: what the rule says ("cpu", "accelerator", "cpu + accelerator", a torch device, "" = stays where it is).
    n_experts and bytes_by_dtype (packed, all experts of the module) are 0 and empty for other modules; weight_bytes
    are the module's own weights as the model stores them.
    """

    path: str
    class_name: str
    rule: str
    op: str
    device: str
    expert_dtype: str = ""
    n_experts: int = 0
    weight_bytes: int = 0
    bytes_by_dtype: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the rules do to a model.

    rows: every module with a rule, in the model's order; untouched_experts: experts modules without one; other_bytes:
    weights of all modules without a rule; totals: packed bytes of all replaced experts by dtype; memory: bytes of each
    device by what they are for (`PlannedMemory`), those of experts in host memory under "host"; ways: of a loaded
    model, how decode steps run: by layer "compiled", or why transformers' own forward does.
    """

    model: str
    model_type: str
    rules: str
    rows: tuple[Row, ...]
    untouched_experts: tuple[str, ...]
    other_bytes: int
    totals: Mapping[str, int]
    remarks: tuple[str, ...]
    ways: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def grouped(self) -> tuple[tuple[str, tuple[Row, ...]], ...]:
        """Rows that differ only by numbers in their path, under one name such as `model.layers.0-47.mlp.experts`."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            template = _NUMBER.sub("*", row.path)
            key = (template, row.class_name, row.rule, row.op, row.device, row.expert_dtype, row.n_experts)
            groups.setdefault(key, []).append(row)
        return tuple((_joined([row.path for row in rows]), tuple(rows)) for rows in groups.values())


def explain(
    model: nn.Module,
    rules: RulesSource = "auto",
    expert_dtype: ExpertDtype = "bfloat16",
    config: RuntimeConfig | None = None,
) -> Explanation:
    """Explain the rules for a model; no weights are read (of a checkpoint: `hybrimoe.checkpoint.meta.meta_model`).

    expert_dtype: for rules that do not say one. config: of the session for which memory is to be planned.
    Raises ModelError, RuleError and UnsupportedExpertsError as `resolve` does; with a configuration DeviceError for an
    accelerator that is not here, and BudgetError for slots that there cannot be.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    resolution = resolve(model, read_rules(rules, model_type))
    found = explain_resolution(model, resolution, expert_dtype)
    return found if config is None else replace(found, memory=_memory(model, resolution, found, config))


def explain_resolution(
    model: nn.Module, resolution: Resolution, expert_dtype: ExpertDtype, remarks: Iterable[str] | None = None,
    accelerators: Mapping[str, str] = MappingProxyType({}),
) -> Explanation:  # fmt: skip
    """The explanation of a resolution that was made already. `accelerators`: by path, where there are several."""
    claimed = claimed_modules(resolution.hits)
    rows = tuple(
        replace(row, device=row.device.replace("accelerator", accelerators.get(row.path, "accelerator")))
        for row in (_row(hit, expert_dtype, claimed) for hit in resolution.hits)
    )
    config = getattr(model, "config", None)
    replaced = [row for row in rows if row.bytes_by_dtype]
    return Explanation(
        model=getattr(config, "name_or_path", "") or type(model).__name__,
        model_type=getattr(config, "model_type", "") or "",
        rules=resolution.source,
        rows=rows,
        untouched_experts=resolution.untouched_experts,
        other_bytes=_own_bytes(model, claimed, set()),
        totals={dtype: sum(row.bytes_by_dtype[dtype] for row in replaced) for dtype in DTYPES},
        remarks=tuple(resolution.remarks if remarks is None else remarks),
    )


def _row(hit: Hit, expert_dtype: ExpertDtype, claimed: frozenset[int]) -> Row:
    rule = hit.rule
    class_name = type(hit.module).__name__
    own = _own_bytes(hit.module, claimed - {id(hit.module)}, set())
    if hit.layout is None or rule.operator is None or rule.operator.placement is None:
        device = rule.kwargs.device if isinstance(rule.kwargs, DefaultKwargs) else None
        if rule.operator is None:
            return Row(hit.path, class_name, rule.where(), "ignored", "")
        return Row(hit.path, class_name, rule.where(), rule.operator.name, device or "", weight_bytes=own)
    chosen = rule.kwargs.expert_dtype if isinstance(rule.kwargs, ExpertsKwargs) else None
    layout = hit.layout
    return Row(
        hit.path,
        class_name,
        rule.where(),
        op=rule.operator.name,
        device=_DEVICE_OF[rule.operator.placement],
        expert_dtype=chosen or expert_dtype,
        n_experts=layout.num_experts,
        weight_bytes=own,
        bytes_by_dtype={dtype: layout.num_experts * layout.spec(dtype).record_bytes for dtype in DTYPES},
    )


def _memory(
    model: nn.Module, resolution: Resolution, found: Explanation, config: RuntimeConfig
) -> dict[str, dict[str, int]]:
    """What a session of this configuration will take, as far as that can be said before its weights are read: slots of
    a card are as many as its memory has room for now."""
    rows = {row.path: row for row in found.rows}
    dtypes = [cast("ExpertDtype", rows[hit.path].expert_dtype) for hit in resolution.experts]
    layouts = [hit.layout for hit in resolution.experts if hit.layout is not None]
    slotted = [rows[hit.path].device != _DEVICE_OF["cpu"] for hit in resolution.experts]
    counts = [layout.num_experts if takes else 0 for layout, takes in zip(layouts, slotted, strict=True)]
    specs = [layout.spec(dtype) for layout, dtype, takes in zip(layouts, dtypes, slotted, strict=True) if takes]
    host = sum(row.bytes_by_dtype[row.expert_dtype] for row in found.rows if row.bytes_by_dtype)
    dense = found.other_bytes + sum(row.weight_bytes for row in found.rows if not row.bytes_by_dtype)
    devices = _devices(config)
    if not devices:
        kv = kv_cache_bytes(model) if config.kv_reserve_bytes is None else config.kv_reserve_bytes
        return {"host": {"dense": dense, "experts": host, "kv": kv}}
    record = max((spec.record_bytes for spec in specs), default=0)
    layers = layers_of(counts, [1.0] * len(devices)) if sum(counts) else [0] * len(devices)
    asked = slots_of(counts, layers, slots_asked_for(config.gpu_expert_slots, sum(counts), record))
    memory, first = {}, 0
    for index, (name, device) in enumerate(devices.items()):
        share, first = sum(counts[first : first + layers[index]]), first + layers[index]
        mine = dense if index == 0 else 0
        if device is None:
            parts, n_slots = PlannedMemory(dense=mine), asked[index]
        else:
            parts = beside_slots(
                device, specs, model if index == 0 else None, config.kv_reserve_bytes if index == 0 else 0
            )
            parts = replace(parts, dense=mine)
            n_slots = asked[index]
            if config.gpu_expert_slots == "auto":
                n_slots = min(share, max(0, memory_info(device)[0] - parts.total) // record) if record else 0
        memory[name] = asdict(replace(parts, slots=n_slots * record))
    return {**memory, "host": {"experts": host}}


def _devices(config: RuntimeConfig) -> dict[str, torch.device | None]:
    """The accelerators of a configuration by name; None for the emulated one. Raises DeviceError."""
    names = (config.accelerator,) if isinstance(config.accelerator, str) else config.accelerator
    require_devices(names)
    found: dict[str, torch.device | None] = {}
    for name in names:
        device = auto_device() if name == "auto" else None
        if name not in ("auto", "none", "emulated"):
            device = indexed(name)
        if device is not None or name == "emulated":
            found[f"{name} {len(found)}" if name in found else name if device is None else str(device)] = device
    return found


_DEVICE_OF: Mapping[str, str] = {"hybrid": "cpu + accelerator", "cpu": "cpu", "accelerator": "accelerator"}
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _own_bytes(module: nn.Module, claimed: frozenset[int], seen: set[int]) -> int:
    """Bytes of a module's weights without those of claimed modules inside it; shared weights count once."""
    if id(module) in claimed:
        return 0
    total = 0
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            total += parameter.numel() * parameter.element_size()
    return total + sum(_own_bytes(child, claimed, seen) for child in module.children())


def _joined(paths: list[str]) -> str:
    """One name for paths that differ only by numbers: the first differing number becomes a range."""
    if len(paths) == 1:
        return paths[0]
    columns = list(zip(*(path.split(".") for path in paths), strict=True))
    return ".".join(column[0] if len(set(column)) == 1 else _ranges(column) for column in columns)


def _ranges(column: tuple[str, ...]) -> str:
    numbers = sorted({int(part) for part in column})
    if len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))
