"""Text from a growing list of tokens: no half characters, no half stop texts."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from typing import Any

__all__ = ["IncrementalDecoder", "StopTexts", "beginning_of_one"]

REPLACEMENT = "\ufffd"
"""What a decoder puts where bytes are no complete character; at the end of a text: perhaps not complete yet."""

CONTEXT_TOKENS = 6
"""Tokens before the new ones that are decoded again with them, because the text of a token can depend on its
neighbours (leading spaces of SentencePiece). vLLM uses 5."""

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""How tokenizers with byte fallback (Llama's form) name a token that is one byte."""


class IncrementalDecoder:
    """Turns token ids into text piece by piece; the pieces joined are what decoding all tokens at once gives.

    Special tokens give no text, but for those of `shown`, whose names are text. `prompt_ids` are only context: their
    text is not given again.

    Two kinds of tokens can change the text before them and are therefore held back. A byte-level token may be part of a
    character: the text then ends with U+FFFD. A byte-fallback token belongs to a run, which is text only if the whole
    run is valid (else each of its bytes is U+FFFD), so a run is given when another token, or the end, closes it.
    `tokenizers.DecodeStream` raises on such runs.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), shown: Set[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._special = _special_ids(tokenizer)
        self._window = self._prompt_window(prompt_ids)
        """Tokens that are decoded together; the text of those before has been given."""
        self._n_given = len(self._decode(self._window).removesuffix(REPLACEMENT))
        """Characters of the window's text that have been given."""
        self._n_settled = len(self._window)
        """Tokens of the window after which, last time, all text had been given: where a next window may begin."""
        self.n_characters = 0
        """Characters given so far."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character or a run of bytes is incomplete."""
        if token in self._shown:
            return self._give_name(token)
        if token in self._special:
            return ""
        self._window.append(token)
        if self._is_byte(token):
            return ""
        text = self._decode(self._window)
        complete = text.removesuffix(REPLACEMENT)
        piece = self._give(complete)
        if complete == text and len(self._window) - self._n_settled >= CONTEXT_TOKENS:
            self._move()
        return piece

    def flush(self) -> str:
        """The rest, at the end of a reply: an incomplete character comes out as U+FFFD."""
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        piece = text[self._n_given :]
        self._n_given = max(self._n_given, len(text))
        self.n_characters += len(piece)
        return piece

    def _give_name(self, token: int) -> str:
        """What is incomplete ends here; then the name of a special token. The text after it is decoded by itself."""
        rest, name = self.flush(), str(self._tokenizer.convert_ids_to_tokens(token))
        self.n_characters += len(name)
        self._window, self._n_given, self._n_settled = [], 0, 0
        return rest + name

    def _move(self) -> None:
        """Begin the window at the last settled place; what is in front of it no longer matters."""
        del self._window[: self._n_settled]
        self._n_given, self._n_settled = len(self._decode(self._window)), len(self._window)

    def _prompt_window(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens that give text, a run of bytes at their beginning whole."""
        window: list[int] = []
        for token in reversed(prompt_ids):
            if token in self._special:
                continue
            if len(window) >= CONTEXT_TOKENS and not self._is_byte(window[0]):
                break
            window.insert(0, token)
        return window

    def _is_byte(self, token: int) -> bool:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(piece, str) and BYTE_TOKEN.fullmatch(piece) is not None

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that `decode` leaves out with skip_special_tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}


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
        keep = beginning_of_one(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of a reply that no stop text ended."""
        text, self._held = self._held, ""
        return text


def beginning_of_one(text: str, wanted: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning of one of the `wanted` texts, and not all of it."""
    longest = 0
    for one in wanted:
        for length in range(min(len(one) - 1, len(text)), longest, -1):
            if text.endswith(one[:length]):
                longest = length
                break
    return longest
