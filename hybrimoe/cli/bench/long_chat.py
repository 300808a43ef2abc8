"""`hybrimoe bench long-chat`: a second turn of a long conversation, by where the first one is kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrimoe.cli.bench import model_run, options
from hybrimoe.cli.shared.files import check_folder, check_readable
from hybrimoe.cli.shared.groups import grouped
from hybrimoe.cli.shared.options import JsonOption, ModelArgument
from hybrimoe.cli.views import render

CONTEXTS = (4096, 16384)
COLUMNS = ("context", "", "turn", "TTFT ms", "spread", "of first", "ms a token", "reused")


def register(app: typer.Typer) -> None:
    """Add `long-chat`."""
    app.command("long-chat")(grouped(long_chat))


def long_chat(
    *,
    model: ModelArgument = None,
    context: Annotated[
        list[int] | None,
        typer.Option("--context", min=64, help="Tokens of a first turn; may be repeated (4096 and 16384)."),
    ] = None,
    turn_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a second turn.")] = 24,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=3, help="Tokens of a reply.")] = 16,
    rounds: options.RoundsOption = 5,
    folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="On the disk to measure (the system's temporary one).")
    ] = None,
    gguf: Annotated[
        str | None, typer.Option(metavar="FILE", help="A GGUF file for llama.cpp beside it (llama-cpp-python).")
    ] = None,
    llama_cpp: Annotated[
        bool, typer.Option("--llama-cpp", help="With --shape: llama.cpp on the same weights beside it, as Q4_0.")
    ] = False,
    group: model_run.RepliesGroup,
    as_json: JsonOption = False,
) -> None:
    """Time to the first token and between tokens of a second turn, after a long first one, in alternating rounds.

    While the reply's own cache still holds the first turn; after another conversation has used it, from the prefix
    cache; after a restart, from disk. On the CPU alone, one reply at a time; the tokens are random. llama.cpp keeps its
    states as llama-server does: in its slot, in a copy in memory, in a saved slot.
    """
    deployment = group.deployment(model)
    check_folder(folder)
    if gguf is not None:
        check_readable(Path(gguf))
    from hybrimoe.bench.model.long_chat import Request, measure

    request = Request(
        model, group.shape, group.layers, deployment, tuple(dict.fromkeys(context or CONTEXTS)), turn_tokens,
        *group.sizes(new_tokens, rounds), folder, llama_cpp, gguf,
    )  # fmt: skip
    group.measured(partial(measure, request), show, as_json=as_json)


def show(result: dict[str, Any]) -> None:
    """Prints what `bench.model.long_chat.measure` returned."""
    what = (
        f"{result['model']}, {result['layers']} layers ({result['weights']} weights), {result['expert_dtype']} experts;"
        f" {result['turn_tokens']} new tokens a turn"
    )
    console = render.out()
    console.print(render.table(what, COLUMNS, [_line(row) for row in result["rows"]]))
    last = {(row["context"], row["contender"]): row for row in result["rows"]}
    for row in last.values():
        held = ", ".join(f"{place} {n / 2**20:.0f} MiB" for place, n in row["tiers"].items())
        console.print(f"{row['context']} tokens, {row['contender']}: {held}", style="dim")
    described = result["machine"]
    console.print(
        "second turns, own cache: nobody has used it since; from memory: another conversation has; from disk: after a"
        " restart",
        style="dim",
    )
    console.print(
        f"measured on {described['cpu']}, {described['cores']} cores, medians of {result['rounds']} alternating rounds;"
        " the disk is read, not the page cache",
        style="dim",
    )


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    ttft = row["ttft_ms"]
    return (
        str(row["context"]), row["contender"], row["turn"].removeprefix("second, "), f"{ttft['median']:.0f}",
        f"{ttft['min']:.0f}-{ttft['max']:.0f}", f"{row['of_first']:.1%}", f"{row['tbt_ms']:.1f}", str(row["reused"]),
    )  # fmt: skip
