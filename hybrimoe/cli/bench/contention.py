"""`hybrimoe bench contention`: how much of the decode speed is left beside other programs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from hybrimoe.cli.bench import options
from hybrimoe.cli.shared.deployment import deploy_config
from hybrimoe.cli.shared.options import AcceleratorOption, ConfigOption, JsonOption, ThreadsOption

QUICK_ROUNDS, QUICK_TOKENS = 2, 12


def register(app: typer.Typer) -> None:
    """Add `contention`."""
    app.command("contention")(contention)


def contention(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As in generate; none: demo.")] = None,
    config: ConfigOption = None,
    accelerator: AcceleratorOption = None,
    threads: ThreadsOption = None,
    loops: Annotated[int, typer.Option(min=1, help="Busy programs beside it. Default: one a core.")] = (
        os.cpu_count() or 1
    ),
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a round's reply.")] = 60,
    rounds: options.RoundsOption = 5,
    quick: options.QuickOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decode steps alone and beside busy loops, in alternating rounds: the share of the idle speed that is kept.

    A third row has threads that never sleep: what the others lose against them on an idle machine.
    """
    settings = deploy_config(config, model=model, accelerator=accelerator, threads=threads)
    from hybrimoe.bench.contention import measure
    from hybrimoe.bench.rounds import busy_warning
    from hybrimoe.cli.shared.opening import open_model, progress_bar
    from hybrimoe.cli.views import render
    from hybrimoe.machine.facts import machine

    remark = busy_warning()
    n_rounds, n_tokens = (min(rounds, QUICK_ROUNDS), min(new_tokens, QUICK_TOKENS)) if quick else (rounds, new_tokens)
    with open_model(settings) as opened, progress_bar() as progress:
        result = measure(opened.generator, loops, n_rounds, n_tokens, progress)
    if as_json:
        render.emit_json(result.as_dict() | {"machine": machine(), "remark": remark})
        return
    if remark:
        render.note(remark)
    found = result.as_dict()
    rows = [
        (name, *(f"{found[key][kind]:.2f}" for kind in ("median", "min", "max")))
        for name, key in (
            ("alone", "idle_ms"),
            (f"beside {loops} busy loops", "busy_ms"),
            ("alone, threads never sleep", "spinning_ms"),
        )
    ]
    render.out().print(render.table("ms of a decode step, measured", ("", "median", "least", "greatest"), rows))
    render.note(
        f"{result.share:.0%} of the idle speed is kept; that its threads sleep costs {result.idle_loss:.1%} of it when"
        f" alone. Medians of {n_rounds} rounds of {n_tokens} tokens."
    )
