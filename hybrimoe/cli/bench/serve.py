"""`hybrimoe bench serve`: users who talk to an OpenAI-compatible server at the same time."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli.bench.options import measured_server
from hybrimoe.cli.shared.groups import PlacementGroup, grouped
from hybrimoe.cli.shared.options import JsonOption, ModelArgument
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hybrimoe.bench.serve.measure import Row

REPLY_S = 600.0
"""Seconds that a reply may take to come before the server counts as dead."""


def register(app: typer.Typer) -> None:
    """Add `serve`."""
    app.command("serve")(grouped(serve))


def serve(
    *,
    model: ModelArgument = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Measure a server that runs (any OpenAI-compatible one).")
    ] = None,
    users: Annotated[
        list[int] | None, typer.Option("--users", "-u", min=1, help="Users at the same time; may be repeated.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each user, one after another.")] = 8,
    turns: Annotated[int, typer.Option(min=1, help="Turns of a conversation: each sends all before it again.")] = 1,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of a conversation's first prompt.")] = 48,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Longest reply, in tokens.")] = 32,
    placement: PlacementGroup,
    prefix_cache: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for what the server's prompts and replies computed.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, max=64, help="Replies that the server computes at once.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Times to the first token and between tokens, and tokens a second, for users who ask at the same time.

    Starts `hybrimoe serve` with the given model and options in a process of its own, or measures the server at --url.
    Replies are greedy; one whose text depends on who else is served ends the benchmark. Waiting in the server's queue
    counts as time to the first token.
    """
    from hybrimoe.bench.serve import measure as serve_bench
    from hybrimoe.cli.shared.opening import progress_bar

    given = asdict(placement) | {"prefix_cache": prefix_cache, "parallel": parallel}
    options = {f"--{name.replace('_', '-')}": value for name, value in given.items() if value is not None}
    if url is None:
        placement.deployment(model)  # what is wrong is said here, not in the log of the server's process
    load = serve_bench.Load(requests, turns, prompt_words, new_tokens)
    with measured_server(url, model, options) as address, _client(address) as client, progress_bar() as progress:
        rows = serve_bench.measure(client, users or [1, 2, 4], load, progress)
        name = client.model
    if as_json:
        render.emit_json({"model": name, "url": url, "rows": serve_bench.as_dicts(rows), "machine": _machine()})
    else:
        _show(f"{name}: {turns} turn(s) a conversation, at most {new_tokens} new tokens a reply; measured", rows)


@contextlib.contextmanager
def _client(address: str) -> Iterator[Any]:
    """A client of the server. Raises MissingExtraError without the extra `serve`."""
    from hybrimoe.bench.serve.client import Client
    from hybrimoe.errors import MissingExtraError

    try:
        import httpx
    except ImportError as error:
        raise MissingExtraError("serve", str(error)) from error
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    with httpx.Client(timeout=REPLY_S, limits=limits) as http:
        yield Client(http, address)


def _machine() -> dict[str, Any]:
    from hybrimoe.machine.facts import machine

    return machine()


COLUMNS = ("users", "asked", "refused", "prompt tokens", "TTFT ms", "gap ms", "tokens/s", "in all", "hits")


def _show(title: str, rows: Sequence[Row]) -> None:
    shown = [
        (row.users, row.requests, row.refused, f"{row.prompt_tokens} ({row.cached_tokens})",
         f"{row.ttft_ms['p50']:.0f} ({row.ttft_ms['p95']:.0f})",
         f"{row.between_ms['p50']:.1f} ({row.between_ms['p95']:.1f})",
         f"{row.user_tokens_per_s:.1f}", f"{row.tokens_per_s:.1f}",
         "-" if row.hit_rate is None else f"{row.hit_rate:.0%}")
        for row in rows
    ]  # fmt: skip
    render.out().print(render.table(title, COLUMNS, shown))
    render.note(
        "in brackets: prompt tokens that were reused, 95th percentiles; gap: between pieces of text; tokens/s:"
        " within a reply, and over all users"
    )
