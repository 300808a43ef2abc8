"""`hybrimoe bench streaming`: what the server adds to a token that it streams."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli import common
from hybrimoe.cli.bench.options import RoundsOption
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.bench.serve.streaming import Row
    from hybrimoe.config.deploy import DeployConfig


def register(app: typer.Typer) -> None:
    """Add `streaming`."""
    app.command("streaming")(common.grouped(streaming))


def streaming(
    *,
    model: common.ModelArgument = None,
    clients: Annotated[list[int] | None, typer.Option(min=1, max=64, help="Clients at once; may be repeated.")] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Tokens of each reply.")] = 256,
    rounds: RoundsOption = 5,
    placement: common.PlacementGroup,
    as_json: common.JsonOption = False,
) -> None:
    """CPU time that the server adds to a streamed token: queues, HTTP, JSON, and what they cost the generating thread.

    Chats are streamed to clients in a process of their own, and CPU time of this process is compared with that of the
    same replies by the same engine in the same thread, which nobody is sent. Sampling and turning tokens into text
    belong to the engine. Take a small model, like that of the package, with --accelerator none --threads 1: else the
    difference is lost in what the engine's own threads take.
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
    from hybrimoe.cli.common_model import open_model
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
    columns = ("clients", "served, us", "engine alone, us", "server, us", "from - to")
    shown = [
        (str(row.clients), f"{row.served_us:.0f}", f"{row.engine_us:.0f}", f"{row.overhead_us:.0f}",
         " - ".join(f"{us:.0f}" for us in row.overhead_us_range))
        for row in rows
    ]  # fmt: skip
    render.out().print(render.table(f"CPU time of a streamed token, of {new_tokens} a reply; measured", columns, shown))
    render.note(
        f"The least disturbed of {rounds} rounds each; all threads of the process; from - to: what rounds differ by."
        " --accelerator none --threads 1 leave out threads that spin, or hold Python's lock, beside the server's."
    )
