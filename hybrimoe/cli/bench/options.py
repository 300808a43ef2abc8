"""Options that benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PolicyList = Annotated[list[str] | None, typer.Option("--policy", help="Policy to measure; may be repeated.")]
DtypeList = Annotated[list[str] | None, typer.Option("--dtype", help="Expert dtype to measure; may be repeated.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Counted rounds.")]
CsvOption = Annotated[Path | None, typer.Option("--csv", help="Write the rows here.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Write a figure here (matplotlib).")]
QuickOption = Annotated[bool, typer.Option("--quick", help="A short run: few rounds and tokens.")]
QUICK_ROUNDS = 3
