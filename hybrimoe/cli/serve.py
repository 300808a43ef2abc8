"""`hybrimoe serve`: one model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import contextlib
import socket
from typing import Annotated, Any

import typer

from hybrimoe.cli import common
from hybrimoe.cli.views import render


def register(app: typer.Typer) -> None:
    """Add `serve`."""
    app.command("serve")(serve)


def serve(
    model: common.ModelArgument = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; the default only serves this machine.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the API.")] = None,
    conversations: Annotated[
        int | None, typer.Option(min=1, max=256, help="Latest conversations whose KV caches are kept (4).")
    ] = None,
    config: common.ConfigOption = None,
    accelerator: common.AcceleratorOption = None,
    slots: common.SlotsOption = None,
    dtype: common.DtypeOption = None,
    policy: common.PolicyOption = None,
    lossy: common.LossyOption = None,
    threads: common.ThreadsOption = None,
    lookahead: common.LookaheadOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Serve /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics until Ctrl-C.

    Requests are answered one at a time, in the order in which they come; one that continues a kept conversation
    computes only what is new. With --json, one line on stdout says where
    the server listens.
    """
    uvicorn = _uvicorn()
    from hybrimoe.cli.common_model import open_model
    from hybrimoe.server.app import create_app

    deployment = common.deploy_config(
        config, model=model, accelerator=accelerator, slots=slots, dtype=dtype, policy=policy, threads=threads,
        lookahead=lookahead, lossy=lossy,
    )  # fmt: skip
    address, number = host or deployment.server.host, deployment.server.port if port is None else port
    listener = _listen(address, number)
    with listener, open_model(deployment) as opened:
        url = f"http://{address}:{listener.getsockname()[1]}"
        kept = conversations or deployment.server.conversations
        application = create_app(opened.generator, name or opened.name, opened.stats, kept)
        if as_json:
            render.emit_json({"url": url, "model": name or opened.name})
        else:
            render.note(f"{name or opened.name} at {url}/v1 (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down by then; Ctrl-C is how a server ends
            uvicorn.Server(uvicorn.Config(application, log_level="warning")).run(sockets=[listener])


def _uvicorn() -> Any:
    """The server library. Raises MissingExtraError without the extra `serve`."""
    from hybrimoe.errors import MissingExtraError

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("serve", str(error)) from error
    return uvicorn


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is known before the model is loaded. Raises ConfigError."""
    from hybrimoe.errors import ConfigError

    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from error
