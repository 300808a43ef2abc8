"""`hybrimoe bench streaming`: what the server adds to a token that it streams."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.bench.options import RoundsOption
from hybrimoe.cli.shared.groups import PlacementGroup, grouped
from hybrimoe.cli.shared.options import JsonOption, ModelArgument
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.bench.serve.streaming import Row
    from hybrimoe.config.deploy import DeployConfig


def register(app: typer.Typer) -> None:
    """Add `streaming`."""
    app.command("streaming")(grouped(streaming))


def streaming(
    *,
    model: ModelArgument = None,
    clients: Annotated[list[int] | None, typer.Option(min=1, max=64, help="Clients at once; may be repeated.")] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Tokens of each reply.")] = 256,
    rounds: RoundsOption = 5,
    placement: PlacementGroup,
    as_json: JsonOption = False,
) -> None:
    """What the server adds to a streamed token: text, stop texts, queues, locks, JSON, HTTP, and what they delay.

    Chats are streamed to clients in a process of their own, and compared with the same replies by the same engine in
    the same thread, which nobody is sent: the time to the first byte and between two tokens as a client sees them, and
    the CPU time of this process. The engine alone is the decode step and the choice of the token. Take a small model,
    like that of the package, with --accelerator none --threads 1: else the difference is lost in what the engine's own
    threads take.
    """
    from hybrimoe.cli.serve import need_extra

    need_extra()
    deployment = placement.deployment(model)
    counts = clients or [1, 4]
    rows = _measured(deployment, counts, new_tokens, rounds)
    if as_json:
        from hybrimoe.machine.facts import machine

        render.emit_json({"rows": [row.as_dict() for row in rows], "machine": machine()})
    else:
        _show(rows, new_tokens, rounds)


def _measured(deployment: DeployConfig, clients: list[int], new_tokens: int, rounds: int) -> list[Row]:
    from hybrimoe.bench.serve.streaming import measure
    from hybrimoe.cli.shared.opening import open_model
    from hybrimoe.server.http import HttpServer, listening
    from hybrimoe.server.models import Models
    from hybrimoe.server.served import Served

    settings = deployment.server.model_copy(update={"access_log": False, "page": False})
    served = Served("measured", parallel=max(clients))
    with (
        open_model(deployment) as opened,
        contextlib.closing(served),
        listening("127.0.0.1", 0) as listener,
        HttpServer(Models.of_one(served), settings, [], listener) as http,
    ):
        served.open(opened.generator, opened.stats)
        return measure(served, http.url, clients, new_tokens, rounds)


def _show(rows: list[Row], new_tokens: int, rounds: int) -> None:
    columns = ("clients", "ms", "served", "engine", "added", "least to most", "text")
    shown = [
        (str(row.clients), what, f"{one.served_ms:.3f}", f"{one.engine_ms:.3f}", f"{one.added_ms:.3f}",
         " to ".join(f"{ms:.2f}" for ms in one.added_ms_range), f"{times * row.text_ms:.3f}")
        for row in rows
        for what, one, times in (
            ("first byte", row.first, 1), ("between two", row.between, row.clients), ("CPU of one", row.cpu, 1)
        )
    ]  # fmt: skip
    render.out().print(render.table(f"Streamed tokens, {new_tokens} a reply; measured", columns, shown))
    render.note(
        f"Medians of {rounds} rounds: what the server adds to the engine alone, and how much of it is text"
        " and stop texts. First byte: prompt and choice of the token, by the clock, each question a new one. Between"
        " two tokens of one reply, by the clock: in that time each client gets one. CPU: all threads of the process."
        " --accelerator none --threads 1 leave out"
        " threads that spin, or hold Python's lock, beside the server's."
    )
