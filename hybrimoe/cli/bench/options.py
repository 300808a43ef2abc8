"""Options that benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PolicyList = Annotated[list[str] | None, typer.Option("--policy", help="Policy to measure; may be repeated.")]
DtypeList = Annotated[list[str] | None, typer.Option("--dtype", help="Expert dtype to measure; may be repeated.")]
ShapeOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Random weights in a real shape instead of a model.")
]
LayersOption = Annotated[int | None, typer.Option(min=1, help="With --shape: only so many layers.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Counted rounds.")]
CsvOption = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the rows as CSV, too.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a figure here (matplotlib).")]
QuickOption = Annotated[bool, typer.Option("--quick", help="A short run: few rounds and tokens.")]
QUICK_ROUNDS = 3
