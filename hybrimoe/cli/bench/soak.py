"""`hybrimoe bench soak`: a server under mixed load for minutes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.bench.options import measured_server
from hybrimoe.cli.shared.groups import PlacementGroup, grouped
from hybrimoe.cli.shared.options import JsonOption, ModelArgument
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.bench.serve.soak import Report


def register(app: typer.Typer) -> None:
    """Add `soak`."""
    app.command("soak")(grouped(soak))


def soak(
    *,
    model: ModelArgument = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A server that runs, instead of one that is started for this.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="How long users go on.")] = 3.0,
    users: Annotated[int, typer.Option("--users", "-u", min=1, help="Users at the same time.")] = 8,
    requests: Annotated[int | None, typer.Option(min=1, help="Stop after so many requests, too.")] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Longest reply, in tokens.")] = 12,
    long_words: Annotated[int, typer.Option(min=1, help="Words of a long prompt.")] = 400,
    huge_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of a huge prompt; those beyond the context must be refused. 0: none.")
    ] = 65_536,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same requests.")] = 0,
    placement: PlacementGroup,
    parallel: Annotated[
        int | None, typer.Option(min=1, max=64, help="Replies that the server computes at once.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Chats and texts, whole and streamed, short, long and huge; a fifth of the clients leave, some read slowly.

    A huge prompt that does not fit the context must be refused with the context; then others fill all of it.

    Exit code 1 where a request is lost, a greedy reply is another one than alone, a stream ends badly, a malformed body
    is answered with other than 4xx, something is left when the users have gone, or the server's memory grows by more
    than 2 % from the second quarter of the time to the last. 3 minutes are for every change, 30 for every night.
    """
    from hybrimoe.bench.serve import soak as soaking
    from hybrimoe.cli.shared.opening import progress_bar

    given = asdict(placement) | {"parallel": parallel}
    options = {f"--{name.replace('_', '-')}": value for name, value in given.items() if value is not None}
    if url is None:
        placement.deployment(model)  # what is wrong is said here, not in the log of the server's process
        options["--access-log"] = False
    load = soaking.Load(minutes, users, requests, new_tokens, long_words, huge_tokens, seed)
    with measured_server(url, model, options) as address, progress_bar() as progress:
        report = soaking.soak(address, load, progress)
    if as_json:
        render.emit_json(report.as_dict())
    else:
        _show(report)
    if report.n_problems:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    memory = report.resident_mib
    grown = "" if report.growth is None else f", {report.growth:+.1%} from the second quarter to the last"
    rows = [
        ("requests", f"{report.sent.total()} in {report.seconds:.0f} s"),
        *((f"  {kind}", str(number)) for kind, number in sorted(report.sent.items())),
        ("ended", ", ".join(f"{number} {how}" for how, number in sorted(report.ended.items()))),
        ("resident memory", f"{memory[0]:.0f} to {max(memory):.0f} MiB{grown}" if memory else "not told"),
        ("problems", str(report.n_problems)),
    ]
    render.out().print(render.table("Mixed load; measured", ("", ""), rows))
    for problem in report.problems:
        render.error(problem)
