"""What a model's forward is given for tokens of which some stand for parts of images.

The tower has run before; here its rows for the tokens at hand are given to the forward as transformers' own would be.
A prompt may be cut anywhere, also within an image, where the model computes its tokens one after another; the parts of
a picture whose tokens see each other both ways (`wants_whole_images`) stay together.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from hybrimoe.generation.images.tokens import Features, ImageToken, Span, has_images, spans

__all__ = ["ImageForward", "positions_module", "wants_whole_images"]

TYPE_OF_IMAGE = 1
"""In transformers' `mm_token_type_ids`; text is 0."""
TYPES, TYPES_OF_EXPERTS = "mm_token_type_ids", "moe_mm_token_type_ids"
"""Arguments of forwards: the second one is of ERNIE, which has experts for images."""
BORDERS = ("image_start_token_id", "image_end_token_id")
"""Tokens of a configuration that stand around an image and go to its experts."""
BOTH_WAYS = "vision"
"""In a configuration: the tokens of an image see each other, whichever stands first."""


def positions_module(model: Any) -> Any:
    """The module that gives image tokens positions in a plane (it has `get_rope_index`); None where none does."""
    found = (module for module in model.modules() if hasattr(module, "rope_deltas"))
    return next((module for module in found if hasattr(module, "get_rope_index")), None)


def wants_whole_images(model: Any) -> bool:
    """Whether the tokens of a picture see those behind them, so that it must be computed at once."""
    config = getattr(model, "config", None)
    text = None if config is None else config.get_text_config(decoder=True)
    return getattr(text, "use_bidirectional_attention", None) == BOTH_WAYS


class ImageForward:
    """For one model: the arguments of its forward that depend on images."""

    def __init__(self, model: Any) -> None:
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._device = model.device
        borders = (getattr(model.config, name, None) for name in BORDERS)
        self._borders = frozenset(number for number in borders if number is not None)
        self.in_a_plane = positions_module(model) is not None
        self.whole_images = wants_whole_images(model)

    def arguments(self, token_ids: Sequence[int], past_ids: Sequence[int], n_shifted: int) -> dict[str, Any]:
        """For tokens behind `past_ids`, whose images shift the positions of what follows by `n_shifted`.

        Raises ValueError where the tower's rows of an image are no longer there.
        """
        here = list(spans(token_ids)) if has_images(token_ids) else []
        given: dict[str, Any] = {}
        if self.in_a_plane:
            given["position_ids"] = self._positions(token_ids, len(past_ids), n_shifted, here)
        if here:
            given["mm_encoder_outputs"] = {"image": self._rows(here)}
            if TYPES in self._takes:  # where they make a mask, that is one over all tokens
                given[TYPES] = self._types([*past_ids, *token_ids] if self.whole_images else token_ids)
        if TYPES_OF_EXPERTS in self._takes and (here or not self._borders.isdisjoint(token_ids)):
            given[TYPES_OF_EXPERTS] = self._types(token_ids, self._borders)
        return given

    def _positions(self, token_ids: Sequence[int], n_past: int, n_shifted: int, here: Sequence[Span]) -> Any:
        """int64 [3, 1, n]: in text the same along all axes; within an image they lie in its plane."""
        import torch

        rows = torch.arange(n_past + n_shifted, n_past + n_shifted + len(token_ids)).expand(3, -1).clone()
        for span in here:
            picture = span.picture
            assert picture.offsets is not None
            first = int(rows[0, span.start])
            if span.place:  # of its beginning nothing is here: n_shifted counts it as so many positions as tokens
                first -= span.place
            rows[:, span.start : span.end] = first + picture.offsets[:, span.place : span.place + span.n_tokens]
            if span.place + span.n_tokens == picture.n_tokens:
                rows[:, span.end :] += picture.n_positions - picture.n_tokens
        return rows[:, None].to(self._device)

    def _rows(self, here: Sequence[Span]) -> Any:
        """The tower's output for the parts of images at hand, in transformers' class."""
        first = _features_of(here[0])
        given: dict[str, Any] = {}
        for name, of_first in first.rows.items():
            parts = [_part(_features_of(span).rows[name], span) for span in here]
            if isinstance(of_first, list):
                given[name] = [self._joined(list(level), name in first.split) for level in zip(*parts, strict=True)]
            else:
                given[name] = self._joined(parts, name in first.split)
        return first.output_type(**given)

    def _joined(self, parts: list[Any], split: bool) -> Any:
        import torch

        moved = [part.to(self._device) for part in parts]
        return tuple(moved) if split else torch.cat(moved)

    def _types(self, token_ids: Sequence[int], borders: frozenset[int] = frozenset()) -> Any:
        """int64 [1, n]: of what a token is a part. borders: plain tokens that count as parts of an image, too."""
        import torch

        types = [TYPE_OF_IMAGE * (type(token) is ImageToken or token in borders) for token in token_ids]
        return torch.tensor([types], device=self._device)


def _features_of(span: Span) -> Features:
    if span.features is None:
        raise ValueError("an image of the prompt is to be computed, and what the model sees of it is no longer there")
    return span.features


def _part(rows: Any, span: Span) -> Any:
    used = slice(span.place, span.place + span.n_tokens)
    return [level[used] for level in rows] if isinstance(rows, list) else rows[used]
