"""How an API words its answers: what every form is given, and what it makes of it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NotRequired

from typing_extensions import TypedDict

from hybrimoe.server.errors import ErrorAnswer
from hybrimoe.server.replies.events import Call, Event, Reasoning, Text
from hybrimoe.server.worker import Piece

if TYPE_CHECKING:
    from hybrimoe.generation import Reply

__all__ = ["EVENT_STREAM", "NDJSON", "Ended", "FinishReason", "Form", "Frame", "Update", "WholeReply", "line", "sse"]

FinishReason = Literal["stop", "length", "tool_calls"]
FINISH: dict[str, FinishReason] = {
    "eos": "stop", "stop": "stop", "complete": "stop", "length": "length", "context": "length", "interrupted": "stop",
    "deadline": "length",
}  # fmt: skip
"""Why a reply ended, in OpenAI's words."""
_as_json = json.JSONEncoder(ensure_ascii=False).encode
EVENT_STREAM, NDJSON = "text/event-stream", "application/x-ndjson"


class StopReason(TypedDict):
    """What a choice tells beside its finish reason."""

    stop_reason: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a reply. has_calls: it called tools."""

    reply: Reply
    has_calls: bool

    @property
    def reason(self) -> FinishReason:
        """Why it ended."""
        reason = FINISH[str(self.reply.finish_reason)]
        return "tool_calls" if self.has_calls and reason == "stop" else reason

    @property
    def stop_reason(self) -> Literal["deadline"] | None:
        """What an answer tells beside `reason`: that the time was over."""
        return "deadline" if self.reply.finish_reason == "deadline" else None

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.reply.prompt_ids)

    @property
    def n_new(self) -> int:
        """Tokens of the reply."""
        return len(self.reply.token_ids)


@dataclass(frozen=True, slots=True)
class Update:
    """What a piece of a reply's text brings. choice: which of the request's replies. piece: with the log probabilities
    of its tokens. ended: with the last one."""

    choice: int
    events: Sequence[Event]
    piece: Piece
    ended: Ended | None = None


@dataclass(frozen=True, slots=True)
class WholeReply:
    """A complete reply. events: with neighbouring texts of one kind in one."""

    events: Sequence[Event]
    piece: Piece
    ended: Ended

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(event.text for event in self.events if isinstance(event, Text))

    @property
    def reasoning(self) -> str:
        """What the model thought before."""
        return "".join(event.text for event in self.events if isinstance(event, Reasoning))

    @property
    def calls(self) -> list[Call]:
        """Calls of tools."""
        return [event for event in self.events if isinstance(event, Call)]


class Form(ABC):
    """How one endpoint words the answer to one request.

    media_type: of a stream. ping: what a stream sends while there is nothing to say; clients skip it.
    """

    media_type: ClassVar[str] = EVENT_STREAM
    ping: ClassVar[str] = ": still working\n\n"

    def opening(self) -> Iterable[str]:
        """What a stream begins with."""
        return ()

    @abstractmethod
    def update(self, update: Update) -> Iterable[str]:
        """What a stream says of a piece."""

    def closing(self, replies: Sequence[Ended]) -> Iterable[str]:
        """What a stream ends with, once all replies have ended."""
        return ()

    def failure(self, answer: ErrorAnswer, body: Any) -> str:
        """What a stream ends with that has failed. body: the answer in the API's words."""
        return sse(body)

    @abstractmethod
    def whole(self, replies: Sequence[WholeReply]) -> Any:
        """The answer that is not streamed."""


def sse(data: Any, event: str | None = None) -> str:
    """A server-sent event."""
    return ("" if event is None else f"event: {event}\n") + f"data: {_as_json(data)}\n\n"


def line(data: Any) -> str:
    """A line of newline-separated JSON."""
    return _as_json(data) + "\n"


class Frame:
    """A message of a stream that is the same for every token but for its text, and is put into words once.

    message: with the text `Frame.TEXT` in the place of the token's, as one JSON string.
    """

    TEXT: ClassVar[str] = "\x00text\x00"

    def __init__(self, message: str) -> None:
        self._before, _, self._after = message.partition(_as_json(self.TEXT))

    def of(self, text: str) -> str:
        """The message with this text."""
        return f"{self._before}{_as_json(text)}{self._after}"
