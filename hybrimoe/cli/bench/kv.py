"""`hybrimoe bench kv`: keys and values in 16, 8 and 4 bit: their errors, their size, and the time of a token."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrimoe.cli.bench import model_run, options
from hybrimoe.cli.shared.files import check_readable
from hybrimoe.cli.shared.groups import grouped
from hybrimoe.cli.shared.options import JsonOption, ModelArgument
from hybrimoe.cli.views import render

DTYPES = ("float32", "bfloat16", "int8", "int4")
CONTEXTS = (4096, 16384)
QUICK_CONTEXT = 1024


def register(app: typer.Typer) -> None:
    """Add `kv`."""
    app.command("kv")(grouped(kv))


def kv(
    *,
    model: ModelArgument = None,
    kv_dtype: Annotated[
        list[str] | None, typer.Option(help="Dtype beside the model's own; may be repeated. Default: int8, int4.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option("--context", min=1, help="Cached tokens; may be repeated. Default: 4096, 16384.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to read; default: the held-out text beside the model, else its card.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens of the text.")] = 4,
    rounds: options.RoundsOption = 7,
    group: model_run.RepliesGroup,
    as_json: JsonOption = False,
) -> None:
    """Keys and values in fewer bits: what that costs in quality, and what it brings in memory and time.

    On the CPU alone. Errors are those of decoding a text as it stands, in compiled steps, against the model's own
    dtype; with --shape there is no text. Times are of contexts that are filled with random keys and values, in
    alternating rounds.
    """
    from hybrimoe.errors import ConfigError, unknown

    names = tuple(kv_dtype or ("int8", "int4"))
    for name in names:
        if name not in DTYPES:
            raise ConfigError(unknown("dtype of keys and values", name, DTYPES))
    check_readable(text)
    deployment = group.deployment(model)
    from hybrimoe.bench.kv_dtypes import Request, measure

    contexts = tuple(context or ((QUICK_CONTEXT,) if group.quick else CONTEXTS))
    request = Request(
        model, group.shape, group.layers, deployment, names, contexts, text, 1 if group.quick else windows,
        group.sizes(1, rounds)[1],
    )  # fmt: skip
    group.measured(partial(measure, request), show, as_json=as_json)


def show(result: dict[str, Any]) -> None:
    """Prints what `bench.kv_dtypes.measure` returned: a line a dtype, the machine."""
    contexts = [time["context"] for time in result["rows"][0]["times"]]
    has_text = result["text"] is not None
    quality = ("error of attention", "perplexity", "same greedy token", "cosine of logits") if has_text else ()
    columns = ("keys, values", "bytes a token", *quality)
    for context in contexts:
        columns += (f"ms at {context}", "attention")
    console = render.out()
    what = f"{result['model']} ({result['weights']} weights), {result['expert_dtype']} experts"
    console.print(render.table(what, columns, [_line(row, has_text) for row in result["rows"]]))
    described = result["machine"]
    read = f"; text: {result['text']}" if has_text else ""
    console.print(f"measured on {described['cpu']}, {described['cores']} cores{read}", style="dim")


def _line(row: dict[str, Any], has_text: bool) -> tuple[str, ...]:
    line = [row["dtype"], str(row["token_bytes"])]
    if has_text:
        line += [f"{row['attention_error']:.2%}", f"{row['perplexity']:.3f}"]
        line += [f"{row['greedy_agreement']:.1%}", f"{row['logit_cosine']:.5f}"]
    for time in row["times"]:
        line += [f"{time['ms']['median']:.2f}", f"{time['attention_ms']['median']:.2f}"]
    return tuple(line)
