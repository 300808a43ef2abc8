"""What the OpenAPI document says of the answers of each API."""

from __future__ import annotations

from typing import Any

from hybrimoe.server.errors import ErrorBody
from hybrimoe.server.forms import EVENT_STREAM

__all__ = ["Responses", "errors", "service_errors", "text_answers"]

DESCRIPTIONS = {
    400: "The request cannot be honoured; the message says why.",
    401: "No API key, or an unknown one.",
    404: "No such model.",
    408: "The request was sent too slowly.",
    413: "The body is larger than this server reads.",
    429: "Too many wait; Retry-After says when to come again.",
    500: "A failure of the server.",
    503: "The model is being loaded, or the server ends.",
}
Responses = dict[int | str, dict[str, Any]]


def errors(body: Any = ErrorBody) -> Responses:
    """Answers of an endpoint that needs the model. body: the API's form of an error."""
    return {status: {"model": body, "description": words} for status, words in DESCRIPTIONS.items()}


def service_errors(body: Any = ErrorBody) -> Responses:
    """Answers of an endpoint that does not."""
    return {status: answer for status, answer in errors(body).items() if status in (401, 408, 413, 500)}


def text_answers(answer: Any, stream: str, *, media_type: str = EVENT_STREAM, error: Any = ErrorBody) -> Responses:
    """Answers of an endpoint that generates. stream: what a streamed answer holds, in words.

    Of a stream the document names no type: some readers take it for that of the whole, others for that of each event.
    """
    content = {media_type: {"schema": {"description": stream}}}
    return {200: {"model": answer, "content": content, "description": "The reply."}, **errors(error)}
