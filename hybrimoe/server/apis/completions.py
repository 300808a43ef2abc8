"""OpenAI's /v1/completions: texts or tokens that are continued."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field, model_validator
from typing_extensions import TypedDict

from hybrimoe.generation.detokenise import IncrementalDecoder
from hybrimoe.server.apis.documented import text_answers
from hybrimoe.server.apis.openai import MOST_CHOICES, Sampling, Usage, choice_options, usage
from hybrimoe.server.asking import TextAsked
from hybrimoe.server.delivery import deliver, unless_left
from hybrimoe.server.errors import RequestError
from hybrimoe.server.fields import (
    MAX_TOKENS,
    Boolean,
    Integer,
    NoLimit,
    Text,
    Texts,
    TokenIds,
    TopLogprobs,
    WholeNumber,
    length_of,
)
from hybrimoe.server.forms import Ended, FinishReason, Form, Frame, StopReason, Update, WholeReply, sse
from hybrimoe.server.models import Models
from hybrimoe.server.urgency import urgency_of
from hybrimoe.server.worker import Piece

if TYPE_CHECKING:
    from hybrimoe.generation import TokenLogprob

MOST_PROMPTS = 256
"""Prompts in one request; more than fit the queue are refused with 429."""
STREAM = "With stream: true. Events `data: {...}` in the form of pieces, `data: [DONE]` at the end; a failure is an \
event with an error object, and no [DONE] follows."

Prompt = str | list[int]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    logprobs: TopLogprobs | None = Field(
        default=None, description="Log probabilities of each token and of so many best ones."
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), WholeNumber] | NoLimit | None = Field(
        default=None, description="null: until the end of the text or of the context. 0 needs echo."
    )
    best_of: Integer | None = Field(
        default=None, ge=1, le=MOST_CHOICES, description="Of so many replies, the n most probable ones by token."
    )
    suffix: Text | None = Field(default=None, description="What stands behind the text; for models that can fill in.")
    echo: Boolean | None = Field(default=None, description="The text begins with the prompt.")

    @model_validator(mode="after")
    def _goes_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of: expected at least n")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError("best_of: the best replies are known at the end, so they cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 leaves nothing to answer; send echo: true for the prompt alone")
        return self

    @property
    def longest_reply(self) -> int | None:
        """See `Sampling`. The token after a prompt takes no computing of its own; the form leaves it out."""
        return 1 if self.max_tokens == 0 else length_of(self.max_tokens)

    @property
    def scores_prompt(self) -> bool:
        """Whether the log probabilities of the prompt's tokens are told."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def n_top_logprobs(self) -> int | None:
        """See `Sampling`."""
        return self.logprobs

    @property
    def n_computed(self) -> int:
        """Replies to each prompt that are computed."""
        return self.best_of or self.n or 1

    def prompts(self) -> list[Prompt]:
        """Each by itself. Raises RequestError for none, and for too many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        if not 0 < len(self.prompt) <= MOST_PROMPTS:
            raise RequestError(f"prompt: expected 1 to {MOST_PROMPTS} prompts, found {len(self.prompt)}", "prompt")
        return [one if isinstance(one, (str, list)) else [one] for one in self.prompt]

    def asked(self, prompt: Prompt) -> TextAsked:
        """One prompt in the server's own form."""
        structure, field = self.answer()
        options = self.options()
        if self.n_computed > (self.n or 1) and options.top_logprobs is None:
            options = replace(options, top_logprobs=0)  # the best ones are chosen by them
        if self.scores_prompt:
            options = replace(options, prompt_logprobs=self.logprobs)
        return TextAsked(prompt, options, self.suffix or "", structure, field)


class CompletionLogprobs(TypedDict):
    """Log probabilities of a completion or of one piece of it; the lists have an entry for each token.

    null is that of a prompt's first token. The best tokens are with the one that stands there, so one more than asked
    for where it is not among them.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(StopReason):
    """The text of a completion or of one piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """The answer of /v1/completions, whole or as a piece of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Echo:
    """What replies to a prompt begin with: its text, its tokens and where the text of each begins."""

    text: str = ""
    token_ids: Sequence[int] = ()
    offsets: Sequence[int] = ()

    @classmethod
    def of(cls, tokenizer: Any, prompt: str | Sequence[int], prompt_ids: Sequence[int]) -> Echo:
        """prompt_ids: the prompt as the model is given it."""
        decoder = IncrementalDecoder(tokenizer)
        offsets, pieces = [], []
        for token in prompt_ids:
            offsets.append(decoder.n_characters)
            pieces.append(decoder.push(token))
        text = prompt if isinstance(prompt, str) else "".join([*pieces, decoder.flush()])
        return cls(text, prompt_ids, offsets)


class CompletionForm(Form):
    """See `Form`. echoes: of each prompt, what its replies begin with."""

    def __init__(self, model: str, tokenizer: Any, body: CompletionRequest, echoes: Sequence[Echo]) -> None:
        self._tokenizer, self._body, self._echoes = tokenizer, body, echoes
        self._n = body.n or 1
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model,
        }  # fmt: skip
        self._only_text = body.logprobs is None and body.max_tokens != 0
        self._frames: dict[int, Frame] = {}

    def opening(self) -> Iterable[str]:
        """The echoed prompts, unless they wait for their log probabilities."""
        for index in range(0 if self._body.scores_prompt else len(self._echoes) * self._n):
            text = self._echoes[index // self._n].text
            if text:
                yield sse(self._head | {"choices": [self._choice(index, Piece(text), None)]})

    def update(self, update: Update) -> Iterable[str]:
        """See `Form`."""
        if self._only_text and update.ended is None:
            yield self._frame(update.choice).of(update.piece.text)
            return
        piece = self._new_part(update.piece)
        if update.piece.prompt_logprobs:
            piece = replace(piece, text=self._echoes[update.choice // self._n].text + piece.text)
        yield sse(self._head | {"choices": [self._choice(update.choice, piece, update.ended)]})

    def closing(self, replies: Sequence[Ended]) -> Iterable[str]:
        """See `Form`."""
        if self._body.include_usage:
            yield sse(self._head | {"choices": [], "usage": self._usage(replies, self._n)})
        yield "data: [DONE]\n\n"

    def whole(self, replies: Sequence[WholeReply]) -> dict[str, Any]:
        """See `Form`."""
        each = self._body.n_computed
        choices: list[CompletionChoice] = []
        for number, echo in enumerate(self._echoes):
            for reply in self._best(replies[number * each : (number + 1) * each]):
                new = self._new_part(reply.piece)
                piece = replace(new, text=echo.text + new.text)
                choices.append(self._choice(len(choices), piece, reply.ended))
        return self._head | {"choices": choices, "usage": self._usage([reply.ended for reply in replies], each)}

    def _new_part(self, piece: Piece) -> Piece:
        """Without the token after a prompt that was to be scored only."""
        return replace(piece, text="", logprobs=(), text_offsets=()) if self._body.max_tokens == 0 else piece

    def _usage(self, replies: Sequence[Ended], n_per_prompt: int) -> Usage:
        counts = usage(replies, n_per_prompt)
        if self._body.max_tokens == 0:
            counts |= {"completion_tokens": 0, "total_tokens": counts["prompt_tokens"]}
        return counts

    def _best(self, replies: Sequence[WholeReply]) -> Sequence[WholeReply]:
        """As many as are wanted, by the mean log probability of their tokens."""
        if len(replies) == self._n:
            return replies
        return sorted(replies, key=lambda reply: -_mean_logprob(reply.piece))[: self._n]

    def _frame(self, index: int) -> Frame:
        """Pieces of a reply that bring nothing but text."""
        if index not in self._frames:
            choice = self._choice(index, Piece(Frame.TEXT), None)
            self._frames[index] = Frame(sse(self._head | {"choices": [choice]}))
        return self._frames[index]

    def _choice(self, index: int, piece: Piece, ended: Ended | None) -> CompletionChoice:
        logprobs = None if self._body.logprobs is None else self._logprobs(piece, self._echoes[index // self._n])
        choice: CompletionChoice = {
            "index": index, "text": piece.text, "logprobs": logprobs,
            "finish_reason": None if ended is None else ended.reason,
        }  # fmt: skip
        if ended is not None and ended.stop_reason is not None:
            choice["stop_reason"] = ended.stop_reason
        return choice

    def _logprobs(self, piece: Piece, echo: Echo) -> CompletionLogprobs:
        prompt = echo.token_ids if piece.prompt_logprobs else ()
        all_of_them = [*piece.prompt_logprobs, *piece.logprobs]
        ids = [*prompt, *(one.token_id for one in piece.logprobs)]
        return {
            "tokens": [self._token_text(token) for token in ids],
            "token_logprobs": [None if one is None else one.logprob for one in all_of_them],
            "top_logprobs": [None if one is None else self._top(one) for one in all_of_them],
            "text_offset": [
                *(echo.offsets if prompt else ()), *(len(echo.text) + offset for offset in piece.text_offsets)
            ],
        }  # fmt: skip

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        best = {self._token_text(token): logprob for token, logprob in reversed(one.top)}
        if best:
            best.setdefault(self._token_text(one.token_id), one.logprob)
        return best

    def _token_text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def add_routes(app: FastAPI, models: Models) -> None:
    """Adds the endpoint."""

    @app.post("/v1/completions", responses=text_answers(Completion, STREAM))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        async with models.using(body.model, request) as served:
            worker, preparation = served.worker(), served.preparation
            asked = [body.asked(prompt) for prompt in body.prompts()]
            prepared = [await unless_left(request, served.encode(partial(preparation.text, one))) for one in asked]
            tokenizer = worker.generator.tokenizer
            echoes = [Echo()] * len(asked)
            if body.echo:
                pairs = zip(asked, prepared, strict=True)
                work = [partial(Echo.of, tokenizer, one.prompt, ready.prompt_ids) for one, ready in pairs]
                echoes = [await unless_left(request, served.encode(one)) for one in work]
            each = [
                replace(one, options=options)
                for one in prepared
                for options in choice_options(one.options, body.n_computed)
            ]
            form = CompletionForm(served.name, tokenizer, body, echoes)
            urgency = urgency_of(request, body.priority, body.max_reply_seconds, body.id_slot)
            return await deliver(worker, each, form, request, streamed=bool(body.stream), urgency=urgency)


def _mean_logprob(piece: Piece) -> float:
    return sum(one.logprob for one in piece.logprobs) / max(1, len(piece.logprobs))
