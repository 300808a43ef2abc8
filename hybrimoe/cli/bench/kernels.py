"""`hybrimoe bench kernels`: expert kernels of this package beside torch, ONNX Runtime and llama.cpp."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli.bench import options
from hybrimoe.cli.shared.files import check_writable, writing
from hybrimoe.cli.shared.options import JsonOption

if TYPE_CHECKING:
    from hybrimoe.bench.kernels.card import KernelRate

QUICK_SHAPES = ("qwen3-30b",)
TOKENS = (1, 4, 16, 64, 256)
QUICK_TOKENS = (1, 16)


def register(app: typer.Typer) -> None:
    """Add `kernels`."""
    app.command("kernels")(kernels)


def kernels(
    shape: Annotated[list[str] | None, typer.Option(help="Layer shape; may be repeated. Default: all four.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens an expert; may be repeated.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Contenders whose name holds this; may be repeated.")] = None,
    rounds: options.RoundsOption = 7,
    quick: options.QuickOption = False,
    csv: options.CsvOption = None,
    plot: options.PlotOption = None,
    as_json: JsonOption = False,
    accelerator: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="The fused kernels of this device (cuda:0); --only then names dtypes."),
    ] = None,
) -> None:
    """One MoE layer call: k distinct experts, M tokens each, weights from memory; medians of alternating rounds.

    Contenders that are wrong are refused, those that are not installed are named and left out.
    """
    check_writable(csv)
    check_writable(plot)
    if accelerator is not None:
        if plot is not None:
            raise typer.BadParameter("--plot is for the CPU; with --accelerator there are --csv and --json")
        _on_accelerator(accelerator, shape, tokens, only, quick, csv, as_json)
        return
    from hybrimoe.bench.kernels import measure as kernels_bench
    from hybrimoe.cli.views import render

    request = kernels_bench.Request(
        shapes=tuple(shape or (QUICK_SHAPES if quick else ())),
        tokens=tuple(tokens or (QUICK_TOKENS if quick else TOKENS)),
        contenders=tuple(only or ()),
        rounds=min(rounds, options.QUICK_ROUNDS) if quick else rounds,
    )
    result = kernels_bench.run(request, render.note)
    if csv is not None:
        with writing(csv):
            kernels_bench.write_csv(result["rows"], csv)
    if plot is not None:
        kernels_bench.write_plot(result, plot)
    if as_json:
        render.emit_json(result)
    else:
        _show(result)


def _on_accelerator(
    name: str, shapes: list[str] | None, tokens: list[int] | None, only: list[str] | None, quick: bool,
    csv: Path | None, as_json: bool,
) -> None:  # fmt: skip
    from gpu_kernels.opening import existing_device
    from hybrimoe.bench.kernels import card
    from hybrimoe.bench.kernels.measure import write_csv
    from hybrimoe.cli.views import render

    device = existing_device(name)
    wanted = shapes or (QUICK_SHAPES if quick else [shape.name for shape in card.CARD_SHAPES])
    chosen = [shape for shape in card.CARD_SHAPES if shape.name in wanted]
    dtypes = [dtype for dtype in card.CARD_DTYPES if not only or any(part in dtype for part in only)]
    if not chosen or not dtypes:
        known = ", ".join(shape.name for shape in card.CARD_SHAPES)
        raise typer.BadParameter(f"nothing to measure: shapes are {known}; --only names {', '.join(card.CARD_DTYPES)}")
    rates = card.kernel_rates(
        device, chosen, dtypes, tokens or (QUICK_TOKENS if quick else card.CARD_TOKENS), progress=render.note
    )
    rows = [asdict(rate) for rate in rates]
    if csv is not None and rows:
        with writing(csv):
            write_csv(rows, csv)
    if as_json:
        render.emit_json({"device": card.device_name(device), "rows": rows})
    else:
        _show_rates(card.device_name(device), rates)


def _show_rates(device: str, rates: list[KernelRate]) -> None:
    from hybrimoe.cli.views import render

    lines = [
        [
            rate.shape, rate.dtype, str(rate.tokens), str(rate.experts), f"{rate.us:.1f}", f"{rate.gbps:.0f}",
            f"{rate.read_share:.0%}", rate.cut,
        ]
        for rate in rates
    ]  # fmt: skip
    columns = ["shape", "dtype", "tokens an expert", "experts", "us", "GB/s", "of read rate", "cut"]
    render.out().print(render.table(f"measured on {device}", columns, lines))


def _show(result: dict[str, Any]) -> None:
    from hybrimoe.cli.views import render

    machine = result["machine"]
    for note in result["notes"]:
        render.note(note)
    lines = [
        [
            row["shape"],
            str(row["tokens"]),
            row["contender"],
            f"{row['ms']:.2f}",
            f"{row['ms_min']:.2f}-{row['ms_max']:.2f}",
            f"{row['gflops']:.0f}",
            f"{row['gbps']:.1f}",
            f"{row['bandwidth_share']:.0%}" if row["tokens"] == 1 else "",
        ]
        for row in result["rows"]
    ]
    title = f"measured on {machine['cpu']}, {machine['cores']} cores"
    columns = ["shape", "tokens", "contender", "ms", "spread", "GFLOP/s", "GB/s", "of read rate"]
    render.out().print(render.table(title, columns, lines))
