"""Tokens that stand for a part of an image: numbers of the vocabulary which also say of which image.

In a prompt an image is a row of placeholders, the same number again and again whatever it shows. All that compares
texts (the prefix cache, its files, the caches of replies) must tell one picture from another, so a placeholder is equal
to another only where both stand for the same part of the same picture. To model, sampler and tokenizer it is the number
it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "Features",
    "ImageToken",
    "Picture",
    "Span",
    "has_images",
    "identities",
    "is_inside",
    "kept",
    "spans",
    "whole_images",
]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What a model's tower makes of an image, in the form in which the model's forward takes it.

    output_type: transformers' class of it. rows: by the name of a field, [n_tokens, D], or a list of those (one a
    level). split: fields that hold a tensor an image, not all images in one.
    """

    output_type: Any
    rows: dict[str, torch.Tensor | list[torch.Tensor]]
    split: frozenset[str]

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(one.nbytes for rows in self.rows.values() for one in (rows if isinstance(rows, list) else [rows]))


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image as a model sees it. key: a hash of its pixels, as the model's processor has prepared them.

    offsets: int64 [axes, n_tokens], positions of its tokens after that of the first, for models that give an image's
    tokens positions in a plane; None for others. n_positions: by how much the text behind it is further on than the
    text before.
    """

    key: bytes
    n_tokens: int
    n_positions: int
    offsets: torch.Tensor | None = None


class ImageToken(int):
    """The placeholder number `place` of `picture`. features: of the picture, None where nothing of it is to be
    computed any more."""

    picture: Picture
    place: int
    features: Features | None

    def __new__(cls, number: int, picture: Picture, place: int, features: Features | None = None) -> ImageToken:
        """number: of the placeholder in the vocabulary."""
        token = super().__new__(cls, number)
        token.picture, token.place, token.features = picture, place, features
        return token

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ImageToken)
            and self.place == other.place
            and self.picture.key == other.picture.key
            and int(self) == int(other)
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((int(self), self.picture.key, self.place))


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one picture in a row of tokens, from `start` to `end`; the first is number `place` of the picture.
    Between them may be others (line ends of the picture, borders of its tiles)."""

    picture: Picture
    features: Features | None
    place: int
    n_tokens: int
    start: int
    end: int


def has_images(token_ids: Iterable[int]) -> bool:
    """Whether one of the tokens stands for a part of an image."""
    return any(type(token) is ImageToken for token in token_ids)


def is_inside(token: int) -> bool:
    """Whether a token goes on with an image that one before it began."""
    return type(token) is ImageToken and token.place > 0


def kept(token_ids: Sequence[int]) -> list[int]:
    """The tokens as caches remember them: equal ones, without features."""
    return [
        ImageToken(int(token), token.picture, token.place) if type(token) is ImageToken else token
        for token in token_ids
    ]


def spans(token_ids: Sequence[int]) -> Iterator[Span]:
    """The pictures of a row of tokens, in its order."""
    at: list[int] = []

    def span() -> Span:
        first = token_ids[at[0]]
        assert isinstance(first, ImageToken)
        return Span(first.picture, first.features, first.place, len(at), at[0], at[-1] + 1)

    for index, token in enumerate(token_ids):
        if type(token) is not ImageToken:
            continue
        if at:
            last = token_ids[at[-1]]
            assert isinstance(last, ImageToken)
            if token.place != last.place + 1 or token.picture.key != last.picture.key:
                yield span()
                at = []
        at.append(index)
    if at:
        yield span()


def whole_images(token_ids: Sequence[int]) -> list[int]:
    """The tokens without those of pictures of which some are missing."""
    if not has_images(token_ids):
        return list(token_ids)
    parts = [one for one in spans(token_ids) if one.n_tokens < one.picture.n_tokens]
    lost = {index for one in parts for index in range(one.start, one.end) if type(token_ids[index]) is ImageToken}
    return [token for index, token in enumerate(token_ids) if index not in lost]


def identities(token_ids: Iterable[int]) -> list[int | str]:
    """The tokens as JSON can hold them: a number, or for a part of an image a text that says of which."""
    return [
        f"{int(token)}:{token.picture.key.hex()}:{token.place}" if type(token) is ImageToken else int(token)
        for token in token_ids
    ]
