"""Answers of the two text endpoints in OpenAI's form: whole, and piece by piece."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import TypedDict

from hybrimoe.server.worker import Piece

if TYPE_CHECKING:
    from hybrimoe.generation import Reply, TokenLogprob

FinishReason = Literal["stop", "length"]
FINISH: dict[str, FinishReason] = {
    "eos": "stop", "stop": "stop", "length": "length", "context": "length", "interrupted": "stop",
}  # fmt: skip


class PromptDetails(TypedDict):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts of one reply."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(TypedDict):
    """One of the best tokens at a place. bytes: null for a token that is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token of the reply, and the best ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log probabilities of a chat reply or of one piece of it."""

    content: list[ChatLogprob]


class CompletionLogprobs(TypedDict):
    """Log probabilities of a completion or of one piece of it; the lists have an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """The text of a completion or of one piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class AssistantMessage(TypedDict):
    """A whole reply of a chat."""

    role: Literal["assistant"]
    content: str


class Delta(TypedDict, total=False):
    """What a piece adds to a reply: the role first, then text."""

    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    """A whole reply of a chat, why it ended, and its log probabilities."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatPieceChoice(TypedDict):
    """One piece of a reply of a chat."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """The answer of /v1/completions, whole or as a piece of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatCompletion(TypedDict):
    """The whole answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(TypedDict, total=False):
    """A piece of the answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPieceChoice]
    usage: Usage


class Form(ABC):
    """How one of the endpoints words its answers to one request. The events of a stream share an id."""

    prefix: ClassVar[str]
    piece_object: ClassVar[str]

    def __init__(self, model: str, tokenizer: Any, with_logprobs: bool) -> None:
        self.tokenizer = tokenizer
        self.with_logprobs = with_logprobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    @abstractmethod
    def whole(self, pieces: Sequence[Piece], reply: Reply) -> dict[str, Any]:
        """The answer that is not streamed."""

    @abstractmethod
    def choice(self, piece: Piece, finish: FinishReason | None) -> CompletionChoice | ChatPieceChoice:
        """The choice of a streamed piece."""

    def opening(self) -> list[dict[str, Any]]:
        """The events before all text."""
        return []

    def event(self, piece: Piece, finish: FinishReason | None = None) -> dict[str, Any]:
        """The event of a piece; the last one says why the reply ended."""
        return self._head | {"object": self.piece_object, "choices": [self.choice(piece, finish)]}

    def counts(self, reply: Reply) -> dict[str, Any]:
        """The event that holds the token counts."""
        return self._head | {"object": self.piece_object, "choices": [], "usage": usage(reply)}

    def _token_text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


class CompletionForm(Form):
    """/v1/completions."""

    prefix = "cmpl"
    piece_object = "text_completion"

    def whole(self, pieces: Sequence[Piece], reply: Reply) -> dict[str, Any]:
        """See `Form`."""
        choice = self.choice(joined(pieces), finish_reason(reply))
        return self._head | {"object": "text_completion", "choices": [choice], "usage": usage(reply)}

    def choice(self, piece: Piece, finish: FinishReason | None) -> CompletionChoice:
        """See `Form`."""
        logprobs = self._logprobs(piece) if self.with_logprobs else None
        return {"index": 0, "text": piece.text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, piece: Piece) -> CompletionLogprobs:
        return {
            "tokens": [self._token_text(one.token_id) for one in piece.logprobs],
            "token_logprobs": [one.logprob for one in piece.logprobs],
            "top_logprobs": [
                {self._token_text(token): logprob for token, logprob in reversed(one.top)} for one in piece.logprobs
            ],
            "text_offset": list(piece.text_offsets),
        }


class ChatForm(Form):
    """/v1/chat/completions."""

    prefix = "chatcmpl"
    piece_object = "chat.completion.chunk"

    def whole(self, pieces: Sequence[Piece], reply: Reply) -> dict[str, Any]:
        """See `Form`."""
        piece = joined(pieces)
        message: AssistantMessage = {"role": "assistant", "content": piece.text}
        choice: ChatChoice = {
            "index": 0, "message": message, "logprobs": self._logprobs(piece), "finish_reason": finish_reason(reply),
        }  # fmt: skip
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": usage(reply)}

    def opening(self) -> list[dict[str, Any]]:
        """The role, as OpenAI's first event has it."""
        choice: ChatPieceChoice = {
            "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None,
        }  # fmt: skip
        return [self._head | {"object": self.piece_object, "choices": [choice]}]

    def choice(self, piece: Piece, finish: FinishReason | None) -> ChatPieceChoice:
        """See `Form`."""
        delta: Delta = {"content": piece.text} if piece.text or finish is None else {}
        return {"index": 0, "delta": delta, "logprobs": self._logprobs(piece), "finish_reason": finish}

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self.with_logprobs:
            return None
        return {"content": [self._logprob(one) for one in piece.logprobs]}

    def _logprob(self, one: TokenLogprob) -> ChatLogprob:
        best = [self._top(token, logprob) for token, logprob in one.top]
        return {**self._top(one.token_id, one.logprob), "top_logprobs": best}

    def _top(self, token: int, logprob: float) -> TopLogprob:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces as one."""
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(one for piece in pieces for one in piece.logprobs),
        tuple(offset for piece in pieces for offset in piece.text_offsets),
    )


def finish_reason(reply: Reply) -> FinishReason:
    """Why a reply ended, in OpenAI's words."""
    return FINISH[str(reply.finish_reason)]


def usage(reply: Reply) -> Usage:
    """Token counts of a reply."""
    prompt, new = len(reply.prompt_ids), len(reply.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": reply.n_reused},
    }
