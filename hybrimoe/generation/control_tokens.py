"""Special tokens that clients write into their messages, kept as the text that they are.

A chat template puts special tokens around each message (`<|im_start|>`, `<|eot_id|>`). The same name within a message
would otherwise become the same token, and its author could end the user's turn and speak as the system. So the names in
what a client sends are marked before the template gets them, and the marked ones are turned into tokens as plain text.
(transformers has this for calls that render and tokenise at once; the server needs the text as well.)
"""

from __future__ import annotations

import copy
import re
import threading
from typing import Any

from hybrimoe.generation.chat import has_chat_template

__all__ = ["ControlTokens"]

BEGIN, END = "\ufdd0", "\ufdd1"
"""Around a name. Unicode has set these two aside for programs' own use: no text has them."""
MARKS = str.maketrans("", "", BEGIN + END)
BEFORE = "\n"
"""A piece is encoded behind it, so that a tokenizer which puts a space in front of a text puts none inside of one."""


class ControlTokens:
    """Those of one tokenizer. Methods may run side by side."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        longest_first = sorted((name for name in names if name.strip()), key=lambda name: (-len(name), name))
        self._names = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._plain: Any = None
        self._making = threading.Lock()

    def mark(self, value: Any) -> Any:
        """`value` (a text, or texts within lists and mappings) with the special tokens in its texts marked."""
        if isinstance(value, str):
            text = value.translate(MARKS)
            return text if self._names is None else self._names.sub(lambda found: BEGIN + found[0] + END, text)
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    @staticmethod
    def shown(text: str) -> str:
        """The text without marks."""
        return text.translate(MARKS)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered conversation: marked names as text, the template's own as tokens."""
        begin = not has_chat_template(self._tokenizer)
        pieces = re.split(f"{BEGIN}([^{BEGIN}{END}]*){END}", text)
        ids = list(self._tokenizer(self.shown(pieces[0]), add_special_tokens=begin)["input_ids"])
        for number, piece in enumerate(pieces[1:], start=1):
            if piece := self.shown(piece):  # a mark alone: the template has cut a name in two
                ids += _inside(self._as_text() if number % 2 else self._tokenizer, piece)
        return ids

    def _as_text(self) -> Any:
        """A tokenizer that takes no special token out of a text.

        It is one of its own: the setting belongs to a tokenizer, and others are in use by other threads.
        """
        with self._making:
            if self._plain is None:
                plain = copy.deepcopy(self._tokenizer)
                plain.split_special_tokens = True
                plain(BEFORE)  # the first call settles its state
                self._plain = plain
        return self._plain


def _inside(tokenizer: Any, piece: str) -> list[int]:
    """Token ids of a piece that stands inside of a text."""
    before = tokenizer(BEFORE, add_special_tokens=False)["input_ids"]
    both = tokenizer(BEFORE + piece, add_special_tokens=False)["input_ids"]
    if both[: len(before)] == before:
        return list(both[len(before) :])
    return list(tokenizer(piece, add_special_tokens=False)["input_ids"])
