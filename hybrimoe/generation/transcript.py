"""One reply as its tokens come: the text, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, Literal

from hybrimoe.generation.detokenise import IncrementalDecoder, StopTexts

__all__ = ["FinishReason", "Transcript"]

FinishReason = Literal["eos", "stop", "complete", "length", "context", "interrupted", "deadline"]
"""complete: the structure that was asked for has its end. deadline: the reply's time was over."""


class Transcript:
    """`push` each new token, then `end`; the pieces of text that they give, joined, are `text`.

    token_ids: the new tokens, an end-of-sequence token included. finish_reason: None while the reply goes on.
    context_tokens: the longest prompt and reply together, None where there is no limit. shown_special: special tokens
    whose names are part of the text.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], *, eos_token_ids: frozenset[int], max_new_tokens: int,
        context_tokens: int | None, stop: Sequence[str] = (), shown_special: Set[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._n_prompt = len(prompt_ids)
        self._eos_token_ids = eos_token_ids
        self._max_new_tokens = max_new_tokens
        self._context_tokens = context_tokens
        self._decoder = IncrementalDecoder(tokenizer, prompt_ids, shown_special)
        self._stops = StopTexts(stop)

    @property
    def n_left(self) -> int:
        """New tokens that may still come."""
        n_new, limit = len(self.token_ids), self._context_tokens
        left = self._max_new_tokens - n_new
        return left if limit is None else min(left, limit - self._n_prompt - n_new)

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended the reply."""
        return self._stops.found

    @property
    def n_characters(self) -> int:
        """Characters of the whole text so far, those that are held back for a stop text included."""
        return self._decoder.n_characters

    def push(self, token: int) -> str:
        """Adds a token; returns the text that it completes. Afterwards `finish_reason` says whether it was the last."""
        self.token_ids.append(token)
        piece = "" if token in self._eos_token_ids else self._stops.push(self._decoder.push(token))
        self.finish_reason = self._reason_to_end(token)
        self.text += piece
        return piece

    def complete(self) -> None:
        """The structure of the reply has its end: the newest token is the last one, however many might have come."""
        if self.finish_reason not in ("eos", "stop"):
            self.finish_reason = "complete"

    def end(self) -> str:
        """What was held back: an incomplete character, the beginning of a stop text."""
        piece = self._stops.push(self._decoder.flush()) + self._stops.flush()
        self.text += piece
        return piece

    def _reason_to_end(self, token: int) -> FinishReason | None:
        n_new, limit = len(self.token_ids), self._context_tokens
        if token in self._eos_token_ids:
            return "eos"
        if self._stops.found is not None:
            return "stop"
        if n_new >= self._max_new_tokens:
            return "length"
        return "context" if limit is not None and self._n_prompt + n_new >= limit else None
