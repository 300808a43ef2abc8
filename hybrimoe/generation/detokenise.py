"""Text from a growing list of tokens: no half characters, no half stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["IncrementalDecoder", "StopTexts"]

REPLACEMENT = "\ufffd"
"""What a decoder puts where bytes are no complete character; at the end of a text: perhaps not complete yet."""

CONTEXT_TOKENS = 6
"""Tokens before the new ones that are decoded again with them, because the text of a token can depend on its
neighbours (leading spaces of SentencePiece). vLLM uses 5."""

MAX_PENDING_TOKENS = 8
"""Tokens held back at most for an incomplete character; a character has at most 4 bytes, so more is no character."""


class IncrementalDecoder:
    """Turns token ids into text piece by piece; the pieces joined are the text of all tokens after the prompt.

    Special tokens give no text. `prompt_ids` are only context: their text is not given again.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._read = len(self._ids)  # tokens whose text has been given
        self._start = 0  # first token of the window that is decoded

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        return self._take(final=len(self._ids) - self._read >= MAX_PENDING_TOKENS)

    def flush(self) -> str:
        """The rest, at the end of a reply: an incomplete character comes out as U+FFFD."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        incomplete = len(text) > len(known) and text.endswith(REPLACEMENT)
        if len(text) < len(known) or (incomplete and not final):
            return ""
        self._start = len(self._ids) if incomplete else max(self._start, self._read - CONTEXT_TOKENS)
        self._read = len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class StopTexts:
    """Watches a stream of text for stop texts and holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that may be shown now. After a stop text, `found` is set and nothing more is given."""
        if self.found is not None:
            return ""
        text = self._held + piece
        hits = [(text.index(stop), stop) for stop in self._stop if stop in text]
        if hits:
            position, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = ""
            return text[:position]
        keep = self._beginning_of_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of a reply that no stop text ended."""
        text, self._held = self._held, ""
        return text

    def _beginning_of_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` that is a beginning of a stop text."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
