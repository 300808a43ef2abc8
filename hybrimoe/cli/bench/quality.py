"""`hybrimoe bench quality`: what expert dtypes and lossy policies cost, in perplexity and greedy agreement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrimoe.cli.bench import options
from hybrimoe.cli.shared.deployment import deploy_config
from hybrimoe.cli.shared.files import check_readable, check_writable, writing
from hybrimoe.cli.shared.options import (
    AcceleratorOption,
    ConfigOption,
    JsonOption,
    ModelArgument,
    PolicyOption,
    SlotsOption,
)
from scheduler.machine.profile import BYTES_PER_WEIGHT

CHANGES = {"skipped": "skipped", "substituted": "substituted", "lowered": "low", "deferred": "late"}
DECODE_WINDOWS = 4
DTYPES = tuple(BYTES_PER_WEIGHT)


def register(app: typer.Typer) -> None:
    """Add `quality`."""
    app.command("quality")(quality)


def quality(
    model: ModelArgument = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to read; default: the held-out text beside the model, else its card.")
    ] = None,
    dtype: options.DtypeList = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens.")] = 8,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer whose outputs are compared.")] = 8,
    lossy: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Compare lossy policies instead of dtypes: a kind as for --lossy, or all."),
    ] = None,
    decode_tokens: Annotated[int, typer.Option(min=2, help="With --lossy: decode steps in each of 4 texts.")] = 128,
    policy: PolicyOption = None,
    slots: SlotsOption = None,
    accelerator: AcceleratorOption = None,
    config: ConfigOption = None,
    csv: options.CsvOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity and greedy agreement of expert dtypes, or of lossy policies (--lossy) beside their speed.

    Dtypes: against float32 experts, with the error of experts on the model's own inputs. Lossy policies: against the
    lossless run with the same experts; decoding follows the text, and alternates between the policies.
    """
    from hybrimoe.cli.views import render
    from hybrimoe.errors import ConfigError

    wrong = [name for name in dtype or () if name not in DTYPES]
    if wrong:
        raise ConfigError(f"--dtype {wrong[0]}: expected one of {', '.join(DTYPES)}")
    check_readable(text)
    check_writable(csv)
    if lossy:
        placed = {"policy": policy, "slots": slots, "accelerator": accelerator, "config": config}
        result, columns, lines, title = _of_lossy(model, text, dtype or [], windows, lossy, decode_tokens, placed)
    else:
        result, columns, lines, title = _of_dtypes(model, text, dtype or [], windows, experts)
    if csv is not None:
        with writing(csv):
            _write_csv(csv, result["rows"])
    if as_json:
        render.emit_json(result)
    else:
        render.out().print(render.table(title, columns, lines))


Shown = tuple[dict[str, Any], list[str], list[list[str]], str]
"""The whole result, and its table: columns, lines, title."""


def _of_dtypes(model: str | None, text: Path | None, dtypes: list[str], windows: int, experts: int) -> Shown:
    deploy_config(None, model=model)
    from hybrimoe.bench.quality import kernels as kernels_quality
    from hybrimoe.cli.views import render

    chosen: Any = tuple(dtypes or DTYPES)
    result = kernels_quality.run(kernels_quality.Request(model, text, chosen, windows, experts), render.note)
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
    return result, columns, lines, f"measured on {result['tokens']} tokens of {result['text']}"


def _of_lossy(
    model: str | None, text: Path | None, dtypes: list[str], windows: int, lossy: list[str], decode_tokens: int,
    placed: dict[str, Any],
) -> Shown:  # fmt: skip
    from hybrimoe.errors import ConfigError

    if len(dtypes) > 1:
        raise ConfigError(f"--lossy takes one --dtype, found {', '.join(dtypes)}")
    dtype = dtypes[0] if dtypes else "bfloat16"
    deployment = deploy_config(placed.pop("config"), model=model, dtype=dtype, **placed)
    from scheduler.lossy import LOSSY_POLICIES

    fitting = sorted(name for name, kind in LOSSY_POLICIES.items() if dtype == "int4" or not kind.uses_planes)
    kinds = [kind for given in lossy for kind in (fitting if given == "all" else [given])]
    from hybrimoe.bench.quality import lossy as lossy_quality
    from hybrimoe.cli.shared.opening import quiet_libraries
    from hybrimoe.cli.views import render

    quiet_libraries()
    request = lossy_quality.Request(
        deployment, text, tuple(dict.fromkeys(kinds)), windows, DECODE_WINDOWS, decode_tokens
    )
    result = lossy_quality.run(request, render.note)
    columns = ["policy", "ppl", "same", "dec. ppl", "same", "KL", "tok/s", "hits", "KiB/tok", "changed"]
    lines = [_lossy_line(row) for row in result["rows"]]
    counts = f"{result['prefill_tokens']} tokens as prompts, {result['decode_tokens']} decoded"
    title = f"experts {result['dtype']}, {counts}, {result['text']} ({result['rows'][0]['provenance']})"
    return result, columns, lines, title


def _lossy_line(row: dict[str, Any]) -> list[str]:
    changed = [f"{row[key]:.0%} {words}" for key, words in CHANGES.items() if row[key]]
    return [
        row["policy"],
        f"{row['perplexity']:.2f}",
        f"{row['greedy_agreement']:.1%}",
        f"{row['decode_perplexity']:.2f}",
        f"{row['decode_greedy_agreement']:.1%}",
        f"{row['decode_divergence']:.4f}",
        f"{row['tokens_per_s']:.1f}",
        "-" if row["hit_rate"] is None else f"{row['hit_rate']:.0%}",
        f"{row['transfer_kib_per_token']:.0f}",
        ", ".join(changed) or "-",
    ]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
