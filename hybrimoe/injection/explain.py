"""Says which rule is for which module of a model, with operator, device and bytes; no weights are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, get_args

from torch import nn

from cpu_kernels import ExpertDtype
from hybrimoe.injection.operators import DefaultKwargs, ExpertsKwargs
from hybrimoe.injection.resolve import Hit, Resolution, claimed_modules, resolve
from hybrimoe.injection.rules import RulesSource, read_rules

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
    weights of all modules without a rule; totals: packed bytes of all replaced experts by dtype; ways: of a loaded
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
) -> Explanation:
    """Explain the rules for a model; no weights are read (of a checkpoint: `hybrimoe.checkpoint.meta.meta_model`).

    expert_dtype: for rules that do not say one.
    Raises ModelError, RuleError and UnsupportedExpertsError as `resolve` does.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return explain_resolution(model, resolve(model, read_rules(rules, model_type)), expert_dtype)


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
