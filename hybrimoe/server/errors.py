"""Errors of a request, and the one place that says with which status and words every error is answered.

A request that cannot be honoured is the client's (4xx) or bad timing (429, 503), and a class of its own; whatever
else is raised is a failure of ours: 500.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from hybrimoe.errors import HybriMoEError, PromptError
from hybrimoe.generation.constraint import ConstraintError

PATH_PART = re.compile(r"\w+")
"""Names and indices of a path to a field; pydantic adds the forms that it tried, which have brackets and hyphens."""
OWN_FIELD = re.compile(r"([a-z]\w*): ")
"""How a message begins that is about a field of the object at hand."""
MOST_OF_NAME = 64
"""Characters of a field's name that are told."""
JSON_NAMES = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"


class RequestError(HybriMoEError):
    """A request that cannot be honoured. `param` names the field."""

    status: ClassVar[int] = 400
    kind: ClassVar[str] = INVALID_REQUEST
    code: ClassVar[str] = "invalid_request"
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def answer_headers(self) -> Mapping[str, str]:
        """Headers of the answer."""
        return self.headers


class UnknownModelError(RequestError):
    """A request for a model that this server does not have."""

    status = 404
    code = "model_not_found"


class KeyRefusedError(RequestError):
    """No API key, or none that this server knows."""

    status = 401
    code = "invalid_api_key"
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class BodyTooLargeError(RequestError):
    """A request body of more bytes than the server reads."""

    status = 413
    code = "request_too_large"


class SlowBodyError(RequestError):
    """A request that is sent too slowly."""

    status = 408
    code = "request_timeout"


class ClientLeftError(RequestError):
    """The client closed the connection before its answer was ready. Nobody reads the answer; the log shows it."""

    status = 499
    code = "client_closed_request"


class UnavailableError(RequestError):
    """Not now; the same request can be answered later."""

    status = 503
    kind = SERVER_ERROR
    code = "unavailable"
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}


class QueueFullError(RequestError):
    """More requests wait than the server is willing to keep. retry_s: when a place should be free."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, retry_s: int = 1) -> None:
        super().__init__(message)
        self.retry_s = retry_s

    def answer_headers(self) -> Mapping[str, str]:
        """When to come again."""
        return {"Retry-After": str(self.retry_s)}


class LateError(QueueFullError):
    """The request has waited for longer than the server lets one wait."""

    code = "waited_too_long"


class LoadingError(UnavailableError):
    """The model is still being loaded."""

    code = "loading"


class DrainingError(UnavailableError):
    """The server is about to end."""

    code = "shutting_down"


class ErrorDetail(TypedDict):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is no success."""

    error: ErrorDetail


class AnthropicErrorDetail(TypedDict):
    """What went wrong, in Anthropic's form."""

    type: str
    message: str


class AnthropicErrorBody(TypedDict):
    """As `ErrorBody`, in Anthropic's form."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class OllamaErrorBody(TypedDict):
    """As `ErrorBody`, in Ollama's form."""

    error: str


ANTHROPIC_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
NESTED = "the body is nested too deeply"
ANTHROPIC_PATH, OLLAMA_PATH = "/v1/messages", "/api/"


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """Status, body and headers of the answer to a request that failed."""

    status: int
    body: ErrorBody
    headers: Mapping[str, str] = field(default_factory=dict)


def error_answer(error: BaseException) -> ErrorAnswer:
    """How `error` is answered."""
    if isinstance(error, RequestError):
        return ErrorAnswer(error.status, _body(str(error), error.kind, error.code, error.param), error.answer_headers())
    if isinstance(error, (PromptError, ConstraintError)):
        return ErrorAnswer(400, _body(str(error), INVALID_REQUEST, "invalid_prompt"))
    if isinstance(error, RequestValidationError):
        where, message = _first_problem(error)
        return ErrorAnswer(400, _body(message, INVALID_REQUEST, "invalid_request", where))
    if isinstance(error, RecursionError):  # whatever goes down the levels of a request
        return ErrorAnswer(400, _body(NESTED, INVALID_REQUEST, "invalid_request"))
    if isinstance(error, HTTPException):
        if error.status_code == 400:  # FastAPI's, for a body that json cannot read
            return ErrorAnswer(400, _body(_unreadable(error.__cause__), INVALID_REQUEST, "invalid_request"))
        kind = INVALID_REQUEST if error.status_code < 500 else SERVER_ERROR
        return ErrorAnswer(error.status_code, _body(str(error.detail), kind), error.headers or {})
    said = str(error) if isinstance(error, HybriMoEError) else f"{type(error).__name__}: {error}"
    return ErrorAnswer(500, _body(f"the server failed: {said}", SERVER_ERROR, "internal_error"))


def worded(answer: ErrorAnswer, path: str) -> Any:
    """The body of an answer in the words of the API that `path` belongs to."""
    message = answer.body["error"]["message"]
    if path.startswith(ANTHROPIC_PATH):
        return {"type": "error", "error": {"type": ANTHROPIC_KINDS.get(answer.status, "api_error"), "message": message}}
    return {"error": message} if path.startswith(OLLAMA_PATH) else answer.body


def _first_problem(error: RequestValidationError) -> tuple[str | None, str]:
    """Field and message of the problem that is told: where a field may have several forms, that of the form which the
    request came nearest to."""
    problem = max(error.errors(), key=lambda one: len(one["loc"]))
    kind, words = problem["type"], str(problem["msg"]).removeprefix("Value error, ")
    if kind == "json_invalid":
        return None, f"the body is not JSON: {problem['ctx']['error']}, at character {problem['loc'][-1]}"
    if tuple(problem["loc"]) == ("body",) and kind != "value_error":
        return None, _no_object(problem.get("input"))
    parts = _path(problem["loc"], error.body, lacks=kind == "missing")
    own = OWN_FIELD.match(words) if kind == "value_error" else None
    if own:  # a check of the whole object, which begins with the field that it is about
        parts, words = [*parts, own[1]], words[own.end() :]
    where = ".".join(parts)
    return where or None, f"{where}: {words}" if where else words


def _path(loc: Sequence[Any], body: Any, *, lacks: bool) -> list[str]:
    """Of pydantic's path to a problem those parts that stand in the request: the others name the forms that it tried.
    lacks: the last one is a field that is not there."""
    if loc[0] != "body":
        return [str(part) for part in loc if PATH_PART.fullmatch(str(part))]
    parts, here = [], body
    for part in loc[1:]:
        there = part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        if there:
            parts.append(str(part)[:MOST_OF_NAME])
            here = here[part]
    return [*parts, str(loc[-1])] if lacks else parts


def _no_object(found: Any) -> str:
    """A body that is nothing an endpoint could read. found: its data, or its bytes where it says to be no JSON."""
    if isinstance(found, bytes):
        return "the body does not say that it is JSON: send the header Content-Type: application/json"
    if found is None:
        return "the request has no body: expected a JSON object"
    return f"the body must be a JSON object, found {JSON_NAMES.get(type(found), 'something else')}"


def _unreadable(cause: BaseException | None) -> str:
    """A body that ends json itself."""
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not UTF-8: {cause.reason} at byte {cause.start}; send it uncompressed, in UTF-8"
    if isinstance(cause, RecursionError):
        return NESTED
    return f"the body cannot be read as JSON: {cause}"


def _body(message: str, kind: str, code: str | None = None, param: str | None = None) -> ErrorBody:
    """Half surrogate pairs of a request that a message quotes are written out: no answer could be sent with them."""
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
