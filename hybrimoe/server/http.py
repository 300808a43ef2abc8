"""The server's place in the network: a socket that is taken before a model is loaded, and uvicorn in a thread."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from hybrimoe.errors import ConfigError

if TYPE_CHECKING:
    from hybrimoe.config.deploy import ServerConfig
    from hybrimoe.server.models import Models

__all__ = ["HttpServer", "listening"]


class HttpServer:
    """uvicorn in a thread of its own, so that it answers while the main thread loads the model and waits for signals.

    on_end: called when it has ended, for whatever reason. Raises MissingExtraError as `open_traces`.
    """

    def __init__(self, models: Models, settings: ServerConfig, keys: list[str], listener: socket.socket) -> None:
        import uvicorn

        from hybrimoe.server.app import create_app
        from hybrimoe.server.tracing import open_traces

        self.url = _url(listener, "http" if settings.tls_cert_file is None else "https")
        self.on_end: Callable[[], None] = lambda: None
        _log_to_stderr(settings.access_log)
        application = create_app(
            models, api_keys=keys, cors_origins=settings.cors_origins, max_body_bytes=int(settings.max_body.value),
            strict=settings.strict, max_body_s=settings.max_body_seconds, page=settings.page,
            traces=open_traces(settings.tracing),
        )  # fmt: skip
        self._listener = listener
        config = uvicorn.Config(
            application, log_level="warning", access_log=False, ssl_certfile=settings.tls_cert_file,
            ssl_keyfile=settings.tls_key_file,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="hybrimoe-http", daemon=True)

    def __enter__(self) -> HttpServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take no more connections, let the answers under way end, and end."""
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        try:
            self._server.run([self._listener])
        finally:
            self.on_end()


def listening(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is known before the model is loaded. Raises ConfigError."""
    address = host.removeprefix("[").removesuffix("]")
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = address == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server(place[:2], family=family, dualstack_ipv6=both)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while attempting")[0]
        raise ConfigError(
            f"cannot listen on {_bracketed(address)}:{port}: {why}; choose another --port or --host"
        ) from error
    # Connections inherit it. Without, the kernel keeps the first text back until the client has confirmed the headers,
    # which clients put off for up to 40 ms; asyncio turns that off only for sockets that say that they are TCP.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    """A host as addresses have it."""
    return f"[{host}]" if ":" in host else host


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the standard error of the moment: a program that runs a server within itself may have replaced it, and
    have closed the former one."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr(access: bool) -> None:
    """Lines of the server's loggers; the access log only where it is asked for."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("hybrimoe.server")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logging.getLogger("hybrimoe.server.access").setLevel(logging.INFO if access else logging.WARNING)
