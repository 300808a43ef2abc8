"""`hybrimoe serve`: models behind HTTP APIs, one in memory at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.shared.groups import PlacementGroup, PrefixGroup, grouped
from hybrimoe.cli.shared.libraries import import_libraries
from hybrimoe.cli.shared.options import API_KEY_VARIABLE, FitOption, JsonOption, ModelArgument
from hybrimoe.cli.views import render
from hybrimoe.text_files import read_text

if TYPE_CHECKING:
    from hybrimoe.config.deploy import DeployConfig, ServerConfig
    from hybrimoe.server.models import Loadable, Models

MOST_NAMED = 5
"""Models on request that the line at the start names."""
EXIT_SECONDS = 10.0
"""After the time to drain, what still does not end (a very long step) is left behind so much later."""


def register(app: typer.Typer) -> None:
    """Add `serve`."""
    app.command("serve")(grouped(serve))


def serve(
    *,
    model: ModelArgument = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on, IPv4 or IPv6; the default only serves this machine.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the API.")] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Serve all models of a folder, each loaded when a request names it."),
    ] = None,
    idle_unload_seconds: Annotated[
        float | None,
        typer.Option(min=0.001, max=31_536_000.0, help="A model leaves memory after so long without a request."),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Replies at once (up to 4, as the memory for keys and values goes)."),
    ] = None,
    queue_length: Annotated[
        int | None, typer.Option(min=0, max=100_000, help="Requests that may wait; one more gets 429 (32).")
    ] = None,
    max_wait_seconds: Annotated[
        float | None,
        typer.Option(min=0.001, max=86_400.0, help="A request that has waited so long gets 429 (any time)."),
    ] = None,
    max_reply_seconds: Annotated[
        float | None,
        typer.Option(min=0.001, max=86_400.0, help="A reply ends so long after its request came (any time)."),
    ] = None,
    max_stall_ms: Annotated[
        float | None,
        typer.Option(
            min=1.0, max=600_000.0, help="Longest part of a prompt between two tokens of the others, ms (500)."
        ),
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(min=0.0, max=86_400.0, help="Time that replies under way have when the server is to end (30)."),
    ] = None,
    page: Annotated[
        bool | None, typer.Option("--page/--no-page", help="A page at / to chat and to see the model at work (on).")
    ] = None,
    tls_cert_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Certificate (PEM) for HTTPS; with --tls-key-file.")
    ] = None,
    tls_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Private key (PEM) of the certificate.")
    ] = None,
    slot_save_path: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where POST /slots saves what a slot holds, and restores it from."),
    ] = None,
    fit: FitOption = False,
    access_log: Annotated[
        bool | None,
        typer.Option("--access-log/--no-access-log", help="A line on stderr for each request, without contents (on)."),
    ] = None,
    prefixes: PrefixGroup,
    placement: PlacementGroup,
    as_json: JsonOption = False,
) -> None:
    """Serve a page to chat at /, the APIs of OpenAI, Anthropic, Ollama and llama-server, /health and /metrics.

    Until Ctrl-C or SIGTERM.

    With --models FOLDER, or server.models in the deployment file, a request loads the model that it names, once the
    replies of the one in memory have ended; without MODEL none is loaded before.

    Up to --parallel requests are answered at once and join and leave at every token; of the others, clients take turns.
    Each greedy reply is the one that the request gets alone. What any request computed, a prompt that begins alike does
    not compute again, as far as --prefix-cache goes; with --prefix-cache-disk not after a restart, either. While the
    model is loaded, /health says so and requests are answered with 503.

    Ctrl-C or SIGTERM: what waits is refused at once, replies under way have --drain-seconds to end; a second one ends
    the server where it stands. With a key in HYBRIMOE_API_KEY, or keys in the file of server.api_key_file, requests
    need one. With --json, a document on stdout says where the server listens, once the model is there.
    """
    need_extra()
    from hybrimoe.server.http import listening

    deployment = placement.deployment(model)
    given = {
        "host": host, "name": name, "models": models, "idle_unload_seconds": idle_unload_seconds,
        "parallel": parallel,
        "queue_length": queue_length, "max_wait_seconds": max_wait_seconds, "max_stall_ms": max_stall_ms,
        "max_reply_seconds": max_reply_seconds, "drain_seconds": drain_seconds, "page": page, "access_log": access_log,
        "tls_cert_file": tls_cert_file, "tls_key_file": tls_key_file, "slot_save_path": slot_save_path,
    }  # fmt: skip
    chosen: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    deployment = deployment.model_copy(update={"server": deployment.server.model_copy(update=chosen)})
    deployment = prefixes.over(deployment)
    keys = read_api_keys(deployment.server)
    check_tls(deployment.server)
    check_slots(deployment.server)
    with listening(deployment.server.host, deployment.server.port if port is None else port) as listener:
        run(deployment, keys, listener, fit=fit, as_json=as_json)


def run(deployment: DeployConfig, keys: list[str], listener: socket.socket, *, fit: bool, as_json: bool) -> None:
    """Listen from the first moment on, load the model, serve until a signal. fit: see `loadable`."""
    import_libraries("hybrimoe.server.app", "uvicorn")
    from hybrimoe.server.http import HttpServer
    from hybrimoe.server.models import Models
    from hybrimoe.server.shelf import deployments

    settings = deployment.server
    shelf = deployments(deployment)
    models = Models(
        {name: loadable(name, own, fit=fit) for name, own in shelf.items()}, idle_unload_s=settings.idle_unload_seconds,
        max_wait_s=settings.max_wait_seconds, max_waiting=max(1, settings.queue_length),
    )  # fmt: skip
    first = next((name for name, own in shelf.items() if own is deployment), None)
    with HttpServer(models, settings, keys, listener) as http, contextlib.closing(models):
        models.start(first)
        with stopped_by_signals() as stop:
            http.on_end = stop.set
            if as_json:
                render.emit_json({"url": http.url, "model": models.name, "models": list(shelf)})
            else:
                page = f", the page at {http.url}/" if settings.page else ""
                render.note(f"{described(models)} at {http.url}/v1{page} (Ctrl-C ends it)")
            stop.wait()
            leave_after(settings.drain_seconds + EXIT_SECONDS)
            models.drain(settings.drain_seconds)
            http.stop()


def loadable(name: str, deployment: DeployConfig, *, fit: bool = False) -> Loadable:
    """How the model of a deployment comes into memory, and how it is served there. fit: with what fits at that time."""
    from hybrimoe.cli.shared.opening import OpenModel, open_model
    from hybrimoe.cli.shared.states import prefix_settings, slot_files, times_file
    from hybrimoe.server.models import Loadable, Progress
    from hybrimoe.server.served import Served

    settled, progress = [deployment], Progress()

    def opening() -> contextlib.AbstractContextManager[OpenModel]:
        if fit:
            from hybrimoe.cli.shared.fitting import fitted

            settled[0] = fitted(deployment, serves=True)
        return open_model(settled[0], told=progress.tell)

    def serving() -> Served:
        settings = settled[0].server
        return Served(
            name, prefix_cache=prefix_settings(settled[0]), queue_length=settings.queue_length,
            parallel=None if settings.parallel == "auto" else settings.parallel, max_stall_ms=settings.max_stall_ms,
            max_wait_s=settings.max_wait_seconds, tool_parser=settings.tool_parser,
            special_in_messages=settings.special_in_messages, max_reply_s=settings.max_reply_seconds,
            slot_files=slot_files(name, settled[0]), times_file=times_file(settled[0]),
        )  # fmt: skip

    return Loadable(opening, serving, deployment.model or name, progress)


def described(models: Models) -> str:
    """The models, and how the one in memory answers, in a phrase."""
    served, names = models.served, list(models.states)
    others = [name for name in names if served is None or name != served.name]
    told = "" if served is None else f"{served.name}, {served.described()}"
    if not others:
        return told
    on_request = f"{', '.join(others[:MOST_NAMED])}{', ...' if len(others) > MOST_NAMED else ''} on request"
    return f"{told}; {on_request}" if told else on_request


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Within the block the first SIGINT or SIGTERM sets the event, and the second ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_after(seconds: float) -> None:
    """End the process after so long, whatever is still computed then."""

    def leave() -> None:
        render.error("the computation under way did not end in time; it is left behind")
        os._exit(1)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


def read_api_keys(settings: ServerConfig) -> list[str]:
    """Keys of the file and of the environment; none where neither is set. Raises ConfigError."""
    from hybrimoe.errors import ConfigError

    key = os.environ.get(API_KEY_VARIABLE)
    keys = [key] if key else []
    if settings.api_key_file is None:
        return keys
    try:
        lines = read_text(Path(settings.api_key_file)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_key_file: cannot read {settings.api_key_file}: {error}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"server.api_key_file: {settings.api_key_file} has no key; expected one a line")
    return keys + found


def check_tls(settings: ServerConfig) -> None:
    """Raises ConfigError where certificate and key cannot be used, before a model is loaded."""
    import ssl

    from hybrimoe.errors import ConfigError

    cert, key = settings.tls_cert_file, settings.tls_key_file
    if cert is None and key is None:
        return
    if cert is None or key is None:
        raise ConfigError("server.tls_cert_file and server.tls_key_file: expected both, found one")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except OSError as error:  # what ssl raises is one, too
        raise ConfigError(
            f"server.tls_cert_file, tls_key_file: cannot use {cert} with {key}: {error}; expected a certificate and its"
            " private key without a password, both in PEM"
        ) from error


def check_slots(settings: ServerConfig) -> None:
    """Raises ConfigError where the folder of slots cannot be used, before a model is loaded."""
    from hybrimoe.server.slots import SlotFiles

    if settings.slot_save_path is not None:
        SlotFiles.check(Path(settings.slot_save_path).expanduser())


def need_extra() -> None:
    """Raises MissingExtraError without the extra `serve`."""
    from hybrimoe.errors import MissingExtraError

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("serve", str(error)) from error
