"""`hybrimoe bench quality`: what int8 and int4 experts cost, activation rounding included."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrimoe.bench import _options
from hybrimoe.cli import common

DTYPES = ("float32", "bfloat16", "int8", "int4")


def register(app: typer.Typer) -> None:
    """Add `quality`."""
    app.command("quality")(quality)


def quality(
    model: common.ModelArgument = None,
    text: Annotated[Path | None, typer.Option(help="Text to read; default: the model card of the model.")] = None,
    dtype: _options.DtypeList = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens.")] = 8,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer whose outputs are compared.")] = 8,
    as_json: common.JsonOption = False,
) -> None:
    """Error of experts on the model's own inputs, perplexity, and greedy agreement with float32 experts."""
    from hybrimoe.bench import _kernels_quality
    from hybrimoe.cli import render
    from hybrimoe.errors import ConfigError

    wrong = [name for name in dtype or () if name not in DTYPES]
    if wrong:
        raise ConfigError(f"--dtype {wrong[0]}: expected one of {', '.join(DTYPES)}")
    chosen: Any = tuple(dtype or DTYPES)
    result = _kernels_quality.run(_kernels_quality.Request(model, text, chosen, windows, experts), render.note)
    if as_json:
        render.emit_json(result)
        return
    columns = ["experts", "error, weights", "error, as run", "perplexity", "same greedy token", "cosine of logits"]
    lines = [
        [
            row["dtype"],
            f"{row['weight_error']:.3%}",
            f"{row['kernel_error']:.3%}",
            f"{row['perplexity']:.3f}",
            f"{row['greedy_agreement']:.2%}",
            f"{row['logit_cosine']:.5f}",
        ]
        for row in result["rows"]
    ]
    title = f"measured on {result['tokens']} tokens of {result['text']}"
    render.out().print(render.table(title, columns, lines))
