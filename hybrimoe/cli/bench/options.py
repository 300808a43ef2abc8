"""Options that benchmarks share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

PolicyList = Annotated[list[str] | None, typer.Option("--policy", help="Policy to measure; may be repeated.")]
DtypeList = Annotated[list[str] | None, typer.Option("--dtype", help="Expert dtype to measure; may be repeated.")]
ShapeOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Random weights in a real shape instead of a model.")
]
LayersOption = Annotated[int | None, typer.Option(min=1, help="With --shape: only so many layers.")]
ExpertsOption = Annotated[
    int | None, typer.Option(min=1, help="With --shape: so many experts in a layer, in place of its own number.")
]
ActiveOption = Annotated[
    int | None, typer.Option(min=1, help="With --shape: so many experts for each token, in place of its own number.")
]
RoundsOption = Annotated[int, typer.Option(min=1, help="Counted rounds.")]
CsvOption = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the rows as CSV, too.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a figure here (matplotlib).")]
QuickOption = Annotated[bool, typer.Option("--quick", help="A short run: few rounds and tokens.")]
QUICK_ROUNDS = 3


@contextlib.contextmanager
def measured_server(url: str | None, model: str | None, options: dict[str, Any]) -> Iterator[str]:
    """The address to measure. Raises ConfigError where options of a server of our own come with --url."""
    from hybrimoe.bench.serve.process import running_server
    from hybrimoe.errors import ConfigError

    if url is not None:
        if model is not None or options:
            raise ConfigError(
                f"--url measures a server as it runs: leave out {', '.join(['MODEL'] * bool(model) + list(options))}"
            )
        yield url
        return
    words = [model] if model is not None else []
    for name, value in options.items():
        flag = name if value is not False else name.replace("--", "--no-")
        words += [flag] if isinstance(value, bool) else [name, str(value)]
    with running_server(words) as address:
        yield address
