"""`hybrimoe inspect`: what a checkpoint holds, and what packing its experts costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from hybrimoe.cli.shared.options import AdapterOption, JsonOption, ModelArgument
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.checkpoint.inspection import AdapterSummary, Inspection, RecordCost, TypeTotals

EXACT = 1e-7  # relative: what float32 arithmetic leaves


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("inspect")(inspect_command)


def inspect_command(model: ModelArgument = None, adapter: AdapterOption = None, as_json: JsonOption = False) -> None:
    """Show the types and bytes of a checkpoint's tensors, and of its experts in each dtype that they can be packed in.

    The error of packing is measured on three experts: the root mean square of the difference to what the file says,
    over that of the weights. With --adapter, to what the merged weights are, and it is shown what the adapter changes.
    Nothing is written.
    """
    from hybrimoe.checkpoint.adapters.settings import check_adapters
    from hybrimoe.checkpoint.source import check_model
    from hybrimoe.cli.shared.opening import quiet_libraries, warnings_as_notes

    check_model(model)
    check_adapters(adapter or ())
    quiet_libraries()
    from hybrimoe.checkpoint.inspection import inspect

    with warnings_as_notes():
        found = inspect(model, adapter or ())
    if as_json:
        render.emit_json(found.as_dict())
    else:
        show(found)


def show(found: Inspection) -> None:
    """Print an inspection as tables."""
    out = render.out()
    files = f"{len(found.files)} files, " if len(found.files) > 1 else ""
    out.print(f"{found.path} ({found.model_type}), {files}{gib(sum(found.files.values()))}", markup=False)
    rows = [
        (f"{part}, {total.type_name}", total.n_tensors, f"{total.n_values / 1e6:.1f} M", f"{bits(total):.2f}", size)
        for part, totals in (("experts", found.experts), ("others", found.dense))
        for total in totals
        for size in [gib(total.n_bytes)]
    ]
    out.print(render.table(None, ("in the file", "tensors", "weights", "bits a weight", "bytes"), rows))
    costs = [(cost.dtype, gib(cost.n_bytes), error(cost)) for cost in found.records]
    out.print()
    out.print(render.table(None, ("experts packed as", "bytes", "error that packing adds"), costs))
    out.print(f"measured on {len(found.sampled_experts)} experts", style="dim")
    said = found.choice.remark or f"experts are packed as {found.choice.dtype}"
    out.print(f"without --dtype, {said}", style="dim", markup=False)
    for one in found.adapters:
        out.print(f"adapter {one.path}: {told(one)}", markup=False, soft_wrap=True)
    for name in found.other:
        out.print(f"left out: {name}", markup=False)


def told(adapter: AdapterSummary) -> str:
    """What an adapter changes, in a phrase."""
    ranks = " and ".join(map(str, adapter.ranks))
    scale = "" if adapter.scale == 1.0 else f", times {adapter.scale:g}"
    changed = f"{adapter.n_experts} parameters of experts and {adapter.n_others} others"
    return f"LoRA of rank {ranks}{scale}; changes {changed} (made for {adapter.base_model})"


def bits(total: TypeTotals) -> float:
    """Bits a weight takes in the file, its share of scales included."""
    return 8 * total.n_bytes / total.n_values


def error(cost: RecordCost) -> str:
    """The error as a share of the weights, or that there is none."""
    return "none" if cost.error < EXACT else f"{cost.error:.2%}"


def gib(n_bytes: int) -> str:
    """Bytes as people read them."""
    return f"{n_bytes / (1 << 30):.2f} GiB" if n_bytes >= 1 << 27 else f"{n_bytes / (1 << 20):.2f} MiB"
