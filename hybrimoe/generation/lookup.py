"""Drafts from the text itself: what followed the last tokens where they stood before is likely to follow again."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["PromptLookup"]

NGRAM_TOKENS = (4, 3, 2)
"""Lengths of the ends that are looked for, longest first: a longer match is right more often, and a single token stands
nearly everywhere."""


class PromptLookup:
    """Prompt-lookup decoding (A. Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding; llama.cpp's `lookup`).

    The latest earlier place of the longest known end of the text gives the draft. A table of all ends makes a draft
    cost the same at any length of the context.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        """Where the token stands that followed an n-gram the last time."""
        for token in token_ids:
            self.append(token)

    def append(self, token: int) -> None:
        """The text goes on with `token`."""
        ids = self._ids
        for n in NGRAM_TOKENS:
            if len(ids) >= n:
                self._follows[tuple(ids[-n:])] = len(ids)
        ids.append(token)

    def draft(self, n_tokens: int) -> list[int]:
        """At most `n_tokens` that may come next; none where no end of the text is known.

        A draft that reaches the end of the text goes on with itself, so that a repetition of any length is continued.
        """
        ids = self._ids
        for n in NGRAM_TOKENS:
            at = self._follows.get(tuple(ids[-n:]))
            if at is not None and len(ids) >= n:
                break
        else:
            return []
        draft: list[int] = []
        for place in range(at, at + n_tokens):
            draft.append(ids[place] if place < len(ids) else draft[place - len(ids)])
        return draft
