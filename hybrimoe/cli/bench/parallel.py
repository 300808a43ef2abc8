"""`hybrimoe bench parallel`: what replies side by side bring, in tokens a second of all of them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from hybrimoe.cli.bench import model_run, options
from hybrimoe.cli.shared.groups import grouped
from hybrimoe.cli.shared.options import JsonOption, ModelArgument
from hybrimoe.cli.views import render

SHOWN_PARTS = 3
"""Parts of a step that the table names: those that take most."""


def register(app: typer.Typer) -> None:
    """Add `parallel`."""
    app.command("parallel")(grouped(parallel))


def parallel(
    *,
    model: ModelArgument = None,
    replies: Annotated[
        list[int] | None, typer.Option("--replies", "-r", min=1, max=64, help="Replies at once; may be repeated.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=4, help="Tokens of a reply.")] = 64,
    rounds: options.RoundsOption = 5,
    group: model_run.RepliesGroup,
    as_json: JsonOption = False,
) -> None:
    """Tokens a second of 1, 2 and 4 replies side by side, as the server computes them, in alternating rounds.

    On the CPU alone. Decode steps are timed, from the first token of the last prompt to the end of the first reply. The
    prompts are passages of a text, with --shape random tokens. A reply that is not the one that its prompt gets alone
    ends the benchmark.
    """
    deployment = group.deployment(model)
    from hybrimoe.bench.model.parallel import Request, measure

    numbers = tuple(dict.fromkeys(replies or (1, 2, 4)))
    request = Request(model, group.shape, group.layers, deployment, numbers, *group.sizes(new_tokens, rounds))
    group.measured(partial(measure, request), show, as_json=as_json)


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
