"""Which tokens a model has: those that its input embeddings have a row for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hybrimoe.errors import PromptError

__all__ = ["check_token_ids", "vocabulary_size"]


def vocabulary_size(model: Any) -> int:
    """Rows of the model's input embeddings; what its configuration says where it has none of its own."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return int(model.config.get_text_config(decoder=True).vocab_size if weight is None else weight.shape[0])


def check_token_ids(model: Any, token_ids: Iterable[int], tokenizer: Any = None, what: str = "the prompt") -> None:
    """Raises PromptError for a token that the model has no embedding of: it would be read from behind their end.

    tokenizer: that of the prompt, which knows the token's text. what: where the tokens come from.
    """
    size, ids = vocabulary_size(model), list(token_ids)
    if not ids or (min(ids) >= 0 and max(ids) < size):
        return
    place, token = next((place, token) for place, token in enumerate(ids) if not 0 <= token < size)
    text = tokenizer.convert_ids_to_tokens(int(token)) if tokenizer is not None and 0 <= token < 2**31 else None
    if text:
        raise PromptError(
            f"{what}: token {token} ({text!r}, at position {place}) is outside the vocabulary of {size}: the tokenizer"
            " has tokens that the model has no embeddings of. Use the tokenizer that the model was trained with"
        )
    raise PromptError(
        f"{what}: token {token} at position {place} is outside the vocabulary of {size}: expected ids from 0 to"
        f" {size - 1}"
    )
