"""`hybrimoe bench needle`: whether a model finds a sentence in a long text, by context, depth and dtype of its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrimoe.cli.shared.deployment import deploy_config
from hybrimoe.cli.shared.files import check_readable
from hybrimoe.cli.shared.options import (
    ConfigOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    RopeFactorOption,
    RopeOriginalOption,
    RopeScalingOption,
    ThreadsOption,
)
from hybrimoe.cli.views import render

KV_DTYPES = ("auto", "float32", "bfloat16", "int8", "int4")
CONTEXTS = (1024, 2048)
DEPTHS = (0.1, 0.5, 0.9)


def register(app: typer.Typer) -> None:
    """Add `needle`."""
    app.command("needle")(needle)


def needle(
    model: ModelArgument = None,
    context: Annotated[
        list[int] | None,
        typer.Option("--context", min=1, help="Tokens of a text; may be repeated. Default: 1024, 2048."),
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(
            "--depth",
            min=0.0,
            max=1.0,
            help="Where the sentence stands, 0 to 1; may be repeated. Default: 0.1, 0.5, 0.9.",
        ),
    ] = None,
    kv_dtype: Annotated[
        list[str] | None,
        typer.Option("--kv-dtype", metavar="|".join(KV_DTYPES), help="Of keys and values; may be repeated."),
    ] = None,
    rope_scaling: RopeScalingOption = None,
    rope_factor: RopeFactorOption = None,
    rope_original_context: RopeOriginalOption = None,
    text: Annotated[
        Path | None, typer.Option(help="Text around it; default: the held-out text beside the model, else its card.")
    ] = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Long-context quality: a secret word stands somewhere in a text, whose last words ask for it.

    Shown are the word's rank among all tokens (1: the model says it) and its probability, beside those in the same text
    without the sentence. Depth 0 is the beginning of the text. On the CPU alone.
    """
    check_readable(text)
    deployments = {
        name: deploy_config(
            config, model=model, dtype=dtype, accelerator="none", threads=threads, kv_dtype=name,
            rope_scaling=rope_scaling, rope_factor=rope_factor, rope_original_context=rope_original_context,
        )
        for name in dict.fromkeys(kv_dtype or ("auto",))
    }  # fmt: skip
    from hybrimoe.cli.shared.opening import progress_bar, quiet_libraries

    quiet_libraries()
    from hybrimoe.bench.quality.needle import Request, measure

    request = Request(deployments, tuple(context or CONTEXTS), tuple(depth or DEPTHS), text)
    with progress_bar() as progress:
        result = measure(request, progress)
    if as_json:
        render.emit_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Prints what `bench.quality.needle.measure` returned: a line a dtype, context and depth."""
    columns = ("keys, values", "context", "depth", "word", "rank", "prob.", "rank without", "prob. without")
    lines = [
        (
            row["kv_dtype"], str(row["context"]), f"{row['depth']:g}", row["word"], str(row["rank"]),
            f"{row['probability']:.3f}", str(row["rank_without"]), f"{row['probability_without']:.5f}",
        )
        for row in result["rows"]
    ]  # fmt: skip
    limit = result["model_context"] or "unlimited"
    console = render.out()
    console.print(render.table(f"{result['model']}, context {limit}, {result['text']}", columns, lines))
    described = result["machine"]
    console.print(f"measured on {described['cpu']}, {described['cores']} cores", style="dim")
