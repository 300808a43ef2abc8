"""`hybrimoe bench parallel`: what replies side by side bring, in tokens a second of all of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hybrimoe.cli import common
from hybrimoe.cli.bench import options
from hybrimoe.cli.views import render

SHOWN_PARTS = 3
"""Parts of a step that the table names: those that take most."""


def register(app: typer.Typer) -> None:
    """Add `parallel`."""
    app.command("parallel")(parallel)


def parallel(
    model: common.ModelArgument = None,
    shape: options.ShapeOption = None,
    layers: options.LayersOption = None,
    replies: Annotated[
        list[int] | None, typer.Option("--replies", "-r", min=1, max=64, help="Replies at once; may be repeated.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=4, help="Tokens of a reply.")] = 64,
    rounds: options.RoundsOption = 5,
    config: common.ConfigOption = None,
    dtype: common.DtypeOption = None,
    threads: common.ThreadsOption = None,
    quick: options.QuickOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Tokens a second of 1, 2 and 4 replies side by side, as the server computes them, in alternating rounds.

    On the CPU alone. Decode steps are timed, from the first token of the last prompt to the end of the first reply. The
    prompts are passages of a text, with --shape random tokens. A reply that is not the one that its prompt gets alone
    ends the benchmark.
    """
    from hybrimoe.errors import ConfigError

    if model is not None and shape is not None:
        raise ConfigError(f"give a model ({model}) or --shape {shape}, not both")
    if layers is not None and shape is None:
        raise ConfigError("--layers goes with --shape: a checkpoint is measured whole")
    deployment = common.deploy_config(config, model=model, accelerator="none", dtype=dtype, threads=threads)
    from hybrimoe.bench import rounds as harness
    from hybrimoe.bench.model.parallel import Request, measure
    from hybrimoe.cli.common_model import progress_bar, quiet_libraries

    quiet_libraries()
    warning = harness.busy_warning()
    if warning:
        render.note(warning)
    counted = min(rounds, options.QUICK_ROUNDS) if quick else rounds
    length = min(new_tokens, 24) if quick else new_tokens
    numbers = tuple(dict.fromkeys(replies or (1, 2, 4)))
    with progress_bar() as progress:
        result = measure(Request(model, shape, layers, deployment, numbers, length, counted), progress)
    if as_json:
        render.emit_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Prints what `bench.model.parallel.measure` returned."""
    rows = [
        (row["replies"], f"{row['tokens_per_s']['median']:.1f}", f"{row['gain']:.2f}x", f"{row['step_ms']:.2f}",
         "-" if row["experts"] is None else f"{row['experts']:.1f}", _parts(row["parts"]))
        for row in result["rows"]
    ]  # fmt: skip
    what = (
        f"{result['model']}, {result['layers']} layers ({result['weights']} weights), {result['expert_dtype']} experts"
    )
    columns = ("replies at once", "tokens/s of all", "", "ms a step", "experts a layer", "of a step's time")
    console = render.out()
    console.print(render.table(what, columns, rows))
    how = "in one step" if result["in_turn"] is None else f"one after another each token: {result['in_turn']}"
    described = result["machine"]
    told = f"measured on {described['cpu']}, {described['cores']} cores; {how}; every reply is the one it is alone"
    console.print(told, style="dim")


def _parts(shares: dict[str, float]) -> str:
    most = sorted(shares, key=lambda part: -shares[part])[:SHOWN_PARTS]
    return ", ".join(f"{part.replace('_', ' ')} {shares[part]:.0%}" for part in most) or "-"
