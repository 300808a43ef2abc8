"""`hybrimoe ctl`: look at a running server, and change what it runs with, over its own HTTP endpoints."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli.shared.options import API_KEY_VARIABLE, JsonOption
from hybrimoe.cli.views import render
from hybrimoe.text_files import read_text

if TYPE_CHECKING:
    from http.client import HTTPResponse

DEFAULT_URL = "http://127.0.0.1:8000"
ANSWER_SECONDS = 60.0
"""In which a server that runs answers: changes are made between two tokens."""
LOADING_SECONDS = 24 * 3600.0
"""A model is packed while it is loaded for the first time, and waits for the replies of the one before."""
SHOWN_CHARACTERS = 200
"""Of an answer that is none of HybriMoE's."""
UNAUTHORISED, NOT_FOUND = 401, 404

UrlOption = Annotated[str, typer.Option("--url", metavar="URL", help="The server.")]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--api-key-file", metavar="FILE", help=f"File whose first line is the key; or {API_KEY_VARIABLE}."),
]


def register(app: typer.Typer) -> None:
    """Add the command group to the program."""
    group = typer.Typer(
        no_args_is_help=True, help="Look at a running server, and change its slots, memory, policy and models."
    )
    group.command("status")(status)
    group.command("slots")(slots)
    group.command("host-memory")(host_memory)
    group.command("kv")(kv)
    group.command("parallel")(parallel)
    group.command("policy")(policy)
    group.command("load")(load)
    group.command("unload")(unload)
    app.add_typer(group, name="ctl")


def status(url: UrlOption = DEFAULT_URL, api_key_file: KeyFileOption = None, as_json: JsonOption = False) -> None:
    """Show who is answered, where experts are and run, and what lies in which memory."""
    state = Server.at(url, api_key_file).state()
    if as_json:
        render.emit_json(state)
    else:
        show(state)


def slots(
    number: Annotated[int, typer.Argument(metavar="N", min=0, help="Expert slots of all accelerators together.")],
    url: UrlOption = DEFAULT_URL, api_key_file: KeyFileOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Change the number of expert slots, between two tokens: replies under way go on."""
    _change({"slots": number}, url, api_key_file, as_json=as_json)


def host_memory(
    size: Annotated[str, typer.Argument(metavar="SIZE", help="12GiB, a share like 0.25, or a number of experts.")],
    url: UrlOption = DEFAULT_URL, api_key_file: KeyFileOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Change the host memory of experts that are read from disk."""
    _change({"host_memory": size}, url, api_key_file, as_json=as_json)


def kv(
    size: Annotated[str, typer.Argument(metavar="SIZE", help="4GiB, or a share like 0.25 of the device's memory.")],
    url: UrlOption = DEFAULT_URL, api_key_file: KeyFileOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Change the memory for keys and values of all replies; what those under way have planned stays theirs."""
    _change({"kv": size}, url, api_key_file, as_json=as_json)


def parallel(
    number: Annotated[int, typer.Argument(metavar="N", min=1, max=64, help="Replies at once.")],
    url: UrlOption = DEFAULT_URL, api_key_file: KeyFileOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Change how many replies are computed at once; fewer than run now are refused."""
    _change({"parallel": number}, url, api_key_file, as_json=as_json)


def policy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A policy's name, or balance/prefetch/cache.")],
    url: UrlOption = DEFAULT_URL, api_key_file: KeyFileOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Have another policy plan from here on; `ctl status` lists those that can."""
    _change({"policy": name}, url, api_key_file, as_json=as_json)


def load(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name of the server's models.")],
    url: UrlOption = DEFAULT_URL, api_key_file: KeyFileOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Load a model, once the replies of the one in memory have ended, and wait until it is there."""
    _move(model, {}, url, api_key_file, as_json=as_json)


def unload(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name of the server's models.")],
    url: UrlOption = DEFAULT_URL, api_key_file: KeyFileOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Have a model leave memory as soon as its replies have ended; a request that names it loads it again."""
    _move(model, {"keep_alive": 0}, url, api_key_file, as_json=as_json)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. url: without a slash at its end. key: None where none is known."""

    url: str
    key: str | None

    @classmethod
    def at(cls, url: str, api_key_file: Path | None) -> Server:
        """Raises ConfigError for what is no URL, FileError for a key file that cannot be read."""
        from hybrimoe.errors import ConfigError, FileError

        whole = url if "://" in url else f"http://{url}"
        parts = urllib.parse.urlsplit(whole)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"--url: expected an address like {DEFAULT_URL}, found {url!r}")
        if api_key_file is None:
            return cls(whole.rstrip("/"), os.environ.get(API_KEY_VARIABLE) or None)
        try:
            lines = read_text(api_key_file).split()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"cannot read {api_key_file} ({error}): expected a file with an API key") from error
        if not lines:
            raise FileError(f"{api_key_file} has no key; expected one in its first line")
        return cls(whole.rstrip("/"), lines[0])

    def state(self) -> dict[str, Any]:
        """What the server says of itself. Errors as `ask`."""
        found = self.ask("/hybrimoe/state")
        if not isinstance(found.get("requests"), dict):
            raise self._stranger(json.dumps(found))
        return found

    def ask(self, path: str, body: dict[str, Any] | None = None, *, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """What the server answers to a GET or, with a body, a POST.

        Raises ServerError where there is no server, a key is needed, it refuses, or it is none of HybriMoE's.
        """
        from hybrimoe.errors import ServerError

        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # the scheme is checked
        try:
            answer: HTTPResponse
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                text = answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            raise self._refused(error.code, error.read().decode("utf-8", "replace"), path) from error
        except TimeoutError as error:
            raise ServerError(
                f"{self.url} did not answer within {seconds:g} seconds; is it busy or stopped?"
            ) from error
        except OSError as error:  # among them URLError
            reason = getattr(error, "reason", error)
            raise ServerError(
                f"no server answers at {self.url} ({reason}); start one with `hybrimoe serve`, or give its --url"
            ) from error
        return self._parsed(text)

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise self._stranger(text) from error
        if not isinstance(found, dict):
            raise self._stranger(text)
        return found

    def _refused(self, code: int, text: str, path: str) -> Exception:
        from hybrimoe.errors import ServerError

        if code == UNAUTHORISED:
            given = "the given key is not one of its keys" if self.key else "no key was given"
            return ServerError(
                f"{self.url} asks for an API key, and {given}: set {API_KEY_VARIABLE}, or --api-key-file"
            )
        try:
            told = json.loads(text)["error"]
            message = told["message"] if isinstance(told, dict) else told
        except (ValueError, KeyError, TypeError):
            message = None
        if not isinstance(message, str) or (code == NOT_FOUND and path.startswith("/hybrimoe/")):
            return self._stranger(text)
        return ServerError(f"{self.url} refuses: {message}")

    def _stranger(self, text: str) -> Exception:
        from hybrimoe.errors import ServerError

        shown = " ".join(text.split())[:SHOWN_CHARACTERS]
        return ServerError(f"{self.url} is no server of this version of HybriMoE: it answers {shown!r}; give --url")


def _change(body: dict[str, Any], url: str, api_key_file: Path | None, *, as_json: bool) -> None:
    state = Server.at(url, api_key_file).ask("/hybrimoe/settings", body)
    if as_json:
        render.emit_json(state)
    else:
        show(state)


def _move(model: str, body: dict[str, Any], url: str, api_key_file: Path | None, *, as_json: bool) -> None:
    """Ollama's way to say which model is wanted in memory: a request without a prompt."""
    server = Server.at(url, api_key_file)
    server.ask("/api/generate", {"model": model, "stream": False, **body}, seconds=LOADING_SECONDS)
    state = server.state()
    if as_json:
        render.emit_json(state)
    else:
        show(state)


def show(state: dict[str, Any]) -> None:
    """Print what a server says of itself."""
    out = render.out()
    lines = [f"{name}: {what}" for name, what in state["models"].items()]
    out.print(f"models    {', '.join(lines)} (server: {state['status']})", markup=False, soft_wrap=True)
    requests, tokens = state["requests"], state["tokens"]
    queue = f"{requests['running']} running, {requests['waiting']} waiting of {requests['queue_length']}"
    out.print(f"requests  {queue}, up to {requests['parallel']} at once", markup=False)
    out.print(f"tokens    {tokens['generated']} in {tokens['steps']} steps", markup=False)
    if (experts := state["experts"]) is not None:
        placed = f"{experts['n_slots']} slots for {experts['n_experts']} experts on {experts['accelerator']}"
        hits = (
            f", {experts['hits'] / experts['activated']:.1%} of those used were in one" if experts["activated"] else ""
        )
        lossy = "" if experts["lossy"] is None else f", lossy: {experts['lossy']}"
        out.print(f"experts   policy {experts['policy']}{lossy}; {placed}{hits}", markup=False, soft_wrap=True)
    rows = [
        (tier["name"].replace("_", " "), tier["device"], _size(tier["bytes"]), _size(tier["of_bytes"]))
        for tier in state["memory"]
    ]
    out.print(render.table(None, ("memory", "where", "bytes", "of"), rows))
    if policies := state["switches"]["policies"]:
        out.print(f"policies that can plan: {', '.join(policies)}", style="dim", markup=False, soft_wrap=True)


def _size(n_bytes: int | None) -> str:
    from hybrimoe.amounts import size_text

    return "" if n_bytes is None else size_text(n_bytes)
