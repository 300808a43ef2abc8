"""`hybrimoe bench speculate`: what drafts from the text bring, on a text to repeat and on a new one."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from hybrimoe.cli.bench import model_run, options
from hybrimoe.cli.shared.groups import grouped
from hybrimoe.cli.shared.options import JsonOption, ModelArgument
from hybrimoe.cli.views import render


def register(app: typer.Typer) -> None:
    """Add `speculate`."""
    app.command("speculate")(grouped(speculate))


def speculate(
    *,
    model: ModelArgument = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=4, help="Tokens of a reply.")] = 128,
    rounds: options.RoundsOption = 7,
    group: model_run.RepliesGroup,
    as_json: JsonOption = False,
) -> None:
    """The time of a step of 1 to 4 tokens, and tokens a second with and without drafts, in alternating rounds.

    On the CPU alone. The first text repeats a passage that stands in the prompt twice and is chosen greedily, the
    second is a new one and drawn; with --shape both prompts are random tokens. A draft that changed a token ends the
    benchmark.
    """
    deployment = group.deployment(model)
    from hybrimoe.bench.model.speculate import Request, measure

    request = Request(model, group.shape, group.layers, deployment, *group.sizes(new_tokens, rounds))
    group.measured(partial(measure, request), show, as_json=as_json)


def show(result: dict[str, Any]) -> None:
    """Prints what `bench.model.speculate.measure` returned: steps, texts, the machine."""
    what = f"{result['model']} ({result['weights']} weights), {result['expert_dtype']} experts"
    first = result["steps"][0]["us"]["median"]
    steps = [
        (row["tokens"], f"{row['us']['median'] / 1e3:.2f}", f"{row['us']['median'] / first:.2f}x",
         "-" if row["pays_from"] is None else f"{row['pays_from']:.0%}")
        for row in result["steps"]
    ]  # fmt: skip
    console = render.out()
    console.print(render.table(what, ("tokens of a step", "ms", "", "pays from an acceptance of"), steps))
    texts = [
        (text["text"], *(f"{text['tokens_per_s'][way]['median']:.1f}" for way in ("without", "with drafts")),
         f"{text['gain']:.2f}x", f"{text['drafts']['accepted_tokens']} of {text['drafts']['drafted_tokens']}",
         text["drafts"]["steps_saved"], text["drafts"]["passed_over"])
        for text in result["texts"]
    ]  # fmt: skip
    columns = ("text", "tokens/s without", "with drafts", "", "right", "steps saved", "passed over")
    console.print(render.table(f"{result['new_tokens']} tokens, {result['rounds']} rounds", columns, texts))
    described = result["machine"]
    told = f"measured on {described['cpu']}, {described['cores']} cores; both ways gave the same tokens"
    console.print(told, style="dim")
