"""Text between a prefix and a suffix, for models that were trained to fill in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe.server.errors import RequestError

__all__ = ["can_infill", "infill_tokens"]


@dataclass(frozen=True, slots=True)
class InfillMarks:
    """Tokens before the prefix, before the suffix, and before what is wanted."""

    prefix: str
    suffix: str
    middle: str
    suffix_first: bool = False


MARKS = (
    InfillMarks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    InfillMarks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    InfillMarks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    InfillMarks("▁<PRE>", "▁<SUF>", "▁<MID>"),
    InfillMarks("[PREFIX]", "[SUFFIX]", "", suffix_first=True),
)
"""Of Qwen Coder; of StarCoder and Granite; of DeepSeek; of Code Llama; of Codestral, which begins with the suffix."""


def can_infill(tokenizer: Any) -> bool:
    """Whether the tokenizer has the marks of a model that can."""
    return _marks(tokenizer) is not None


def infill_tokens(tokenizer: Any, prefix: str, suffix: str) -> list[int]:
    """The prompt for what stands between. Raises RequestError for a model that cannot fill in."""
    marks = _marks(tokenizer)
    if marks is None:
        raise RequestError("this model cannot fill in: its tokenizer has no tokens for prefix and suffix", "suffix")
    before = [_id(tokenizer, marks.prefix), *_plain(tokenizer, prefix)]
    behind = [_id(tokenizer, marks.suffix), *_plain(tokenizer, suffix)]
    ids = [*behind, *before] if marks.suffix_first else [*before, *behind]
    begin = [] if tokenizer.bos_token_id is None else _plain(tokenizer, "", special=True)[:1]
    return [*begin, *ids, *([_id(tokenizer, marks.middle)] if marks.middle else [])]


def _marks(tokenizer: Any) -> InfillMarks | None:
    known = tokenizer.get_vocab()
    wanted = ((one, [one.prefix, one.suffix, *([one.middle] if one.middle else [])]) for one in MARKS)
    return next((one for one, tokens in wanted if all(token in known for token in tokens)), None)


def _plain(tokenizer: Any, text: str, *, special: bool = False) -> Sequence[int]:
    ids: Sequence[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))
