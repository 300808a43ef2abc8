"""`hybrimoe bench kernels`: expert kernels of this package beside torch, ONNX Runtime and llama.cpp."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hybrimoe.cli import common
from hybrimoe.cli.bench import options

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
    as_json: common.JsonOption = False,
) -> None:
    """One MoE layer call: k distinct experts, M tokens each, weights from memory; medians of alternating rounds.

    Contenders that are wrong are refused, those that are not installed are named and left out.
    """
    common.check_writable(csv)
    common.check_writable(plot)
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
        kernels_bench.write_csv(result["rows"], csv)
    if plot is not None:
        kernels_bench.write_plot(result, plot)
    if as_json:
        render.emit_json(result)
    else:
        _show(result)


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
