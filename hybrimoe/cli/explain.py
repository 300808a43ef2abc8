"""`hybrimoe explain`: which rule is for which module of a model, with operator, device and bytes; reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.shared.deployment import check_rules, deploy_config
from hybrimoe.cli.shared.options import (
    ConfigOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    RopeFactorOption,
    RopeOriginalOption,
    RopeScalingOption,
)
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.injection import Explanation
    from hybrimoe.injection.explain import Row

RulesOption = Annotated[
    str | None, typer.Option("--rules", metavar="FILE", help="Rule file or shipped rule set; default as in the config.")
]
AllOption = Annotated[bool, typer.Option("--all", help="One line for every module instead of one for all layers.")]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("explain")(explain_command)


def explain_command(
    model: ModelArgument = None,
    rules: RulesOption = None,
    config: ConfigOption = None,
    dtype: DtypeOption = None,
    rope_scaling: RopeScalingOption = None,
    rope_factor: RopeFactorOption = None,
    rope_original_context: RopeOriginalOption = None,
    every_module: AllOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show which rule places which module where, and how many bytes that takes. No weights are read."""
    check_rules(rules)
    deployment = deploy_config(
        config, model=model, dtype=dtype, rope_scaling=rope_scaling, rope_factor=rope_factor,
        rope_original_context=rope_original_context, weights=False,
    )  # fmt: skip
    from hybrimoe.cli.shared.opening import quiet_libraries

    quiet_libraries()
    from hybrimoe.checkpoint.meta import expert_choice, meta_model, packing_remark
    from hybrimoe.checkpoint.rope import told
    from hybrimoe.config.runtime import runtime_config
    from hybrimoe.generation.context import model_context_tokens
    from hybrimoe.injection import explain

    source = deployment.located_rules() if rules is None else rules
    meta = meta_model(deployment.model, deployment.vision, deployment.rope)
    choice = expert_choice(deployment.model, meta, deployment.cpu.expert_dtype, deployment.adapters)
    explanation = explain(meta, source, choice.dtype, runtime_config(deployment))
    if remark := choice.remark or packing_remark(deployment.model, choice.dtype):
        explanation = replace(explanation, remarks=(*explanation.remarks, remark))
    if deployment.rope is not None:
        context = told(model_context_tokens(meta.config), deployment.rope)
        explanation = replace(explanation, remarks=(*explanation.remarks, context))
    if as_json:
        render.emit_json(explanation.as_dict())
    else:
        show(explanation, every_module=every_module)


def show(explanation: Explanation, *, every_module: bool = False) -> None:
    """Print an explanation as tables."""
    from rich.markup import escape
    from rich.table import Table

    out = render.out()
    out.print(f"{explanation.model} ({explanation.model_type}), rules {short_rule(explanation.rules)}", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("module", overflow="fold")
    for column in ("operator", "device", "experts", "bytes", "line"):
        table.add_column(column, justify="right" if column in ("experts", "bytes") else "left", no_wrap=True)
    for name, rows in [(row.path, (row,)) for row in explanation.rows] if every_module else explanation.grouped():
        table.add_row(*(escape(cell) for cell in _cells(name, rows, explanation.rules)))
    out.print(table)
    if any(explanation.totals.values()):
        totals = ", ".join(f"{size(total)} as {dtype}" for dtype, total in explanation.totals.items())
        out.print(f"\nreplaced experts: {totals}")
    out.print(f"modules without a rule: {size(explanation.other_bytes)}")
    for device, parts in explanation.memory.items():
        out.print(f"memory of {device}: {memory_text(parts)}", markup=False)
    for path in explanation.untouched_experts:
        out.print(f"experts without a rule: {path}")
    for path, way in explanation.ways.items():
        out.print(f"decode steps of {path}: {way}", markup=False)
    for remark in explanation.remarks:
        out.print(short_rule(remark), style="dim", markup=False)


def _cells(name: str, rows: tuple[Row, ...], source: str) -> tuple[str, ...]:
    first, count = rows[0], len(rows)
    own = count * (first.bytes_by_dtype[first.expert_dtype] if first.bytes_by_dtype else first.weight_bytes)
    operator = f"{first.op} {first.expert_dtype}".strip()
    device = "both" if first.op == "hybrid_experts" else first.device or "as it is"
    place = first.rule.partition(": rule")[0]
    rule = place.removeprefix(f"{source}:") if place.startswith(f"{source}:") else short_rule(place)
    return name, operator, device, str(count * first.n_experts or ""), size(own), rule


PART_NAMES = {
    "dense": "weights around the experts",
    "slots": "expert slots",
    "experts": "experts",
    "kv": "keys and values",
    "unpack": "an expert that a prompt unpacks",
    "workspaces": "workspaces of matrix products",
    "graphs": "recorded steps",
    "reserve": "activations",
    "staging": "staging buffers (page-locked, of the host)",
}
"""In words, in the order in which they are told."""


def memory_text(parts: Mapping[str, int]) -> str:
    """What a device's memory is for, with the sum."""
    told = [f"{size(parts[name])} {words}" for name, words in PART_NAMES.items() if parts.get(name)]
    total = sum(n_bytes for name, n_bytes in parts.items() if name != "staging")
    return f"{size(total)}: {', '.join(told)}"


def short_rule(text: str) -> str:
    """A place `folder/file.yaml:3: rule 0` without the folder."""
    place, colon, rest = text.partition(":")
    return place.replace("\\", "/").rsplit("/", 1)[-1] + colon + rest


def size(n_bytes: int) -> str:
    """Bytes as people read them."""
    amount = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f}{unit}" if unit == "B" else f"{amount:.1f}{unit}"
        amount /= 1024
    return f"{amount:.1f}TiB"
