"""Options that several benchmarks share."""

from __future__ import annotations

from typing import Annotated

import typer

PolicyList = Annotated[list[str] | None, typer.Option("--policy", help="Policy to measure; may be repeated.")]
DtypeList = Annotated[list[str] | None, typer.Option("--dtype", help="Expert dtype to measure; may be repeated.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Counted rounds.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="A short run: few rounds and tokens.")]
QUICK_ROUNDS = 3
