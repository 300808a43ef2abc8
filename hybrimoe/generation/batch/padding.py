"""Padded batches: prompts side by side, and experts that do nothing for padding and for replies that have ended.

In a padded batch a model routes its padding too, and a reply that ended goes on with padding until the last one ends.
While `Padding` listens, the experts see those tokens as routed nowhere (-1): no expert computes, moves or is counted
for them. Attention does not look at padding, so nothing that belongs to a reply changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scheduler.batching import activation_counts

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Padding", "left_padded", "listening"]

ABSENT = -1
ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), int64 [n, longest]; shorter prompts are padded on the left.

    Padding repeats a prompt's first token: processors that look at the tokens of a sequence (repetition penalty) find
    nothing new in it.
    """
    import torch

    width = max(len(prompt) for prompt in prompts)
    ids = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@dataclass(slots=True)
class Padding:
    """What one batch's tokens are. ``ended``: bool [n], set by whoever watches the replies.

    With ``count`` it adds up in ``activations`` [n, layers, experts] and ``tokens`` [n] which experts each prompt's
    real tokens went to.
    """

    ended: NDArray[np.bool_]
    count: bool = False
    activations: NDArray[np.float64] | None = None
    tokens: NDArray[np.int64] | None = None
    _real: NDArray[np.bool_] | None = None
    _seen: dict[int, NDArray[np.integer]] | None = None

    def begin(self, kwargs: dict[str, Any]) -> None:
        """The model is called: which of its tokens are real. Unknown (None) where it is not told."""
        self._real = None
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or mask is None or mask.dim() != 2 or len(ids) != len(self.ended):
            return
        real = mask[:, -ids.shape[1] :].cpu().numpy().astype(bool)
        self._real = real & ~self.ended[:, None]
        self._seen = {}

    def routed(self, layer: int, index: torch.Tensor) -> torch.Tensor:
        """The routing [T, k] of a layer's call with the tokens that are not real routed nowhere."""
        import torch

        real = self._real
        if real is None or len(index) != real.size:
            return index
        if self.count and self._seen is not None:
            self._seen[layer] = index.cpu().numpy()
        if real.all():
            return index
        away = torch.from_numpy(~real.reshape(-1)).to(index.device)
        return index.masked_fill(away[:, None], ABSENT)

    def finish(self, n_experts: Sequence[int]) -> None:
        """The model's call has ended: count its routing (the last call of each layer: earlier ones are probes).

        Layers that were not called (experts for images) count nothing.
        """
        real, seen = self._real, self._seen
        if not self.count or real is None or not seen:
            return
        nowhere = np.full_like(next(iter(seen.values())), ABSENT)
        ids = np.stack([seen.get(layer, nowhere) for layer in range(len(n_experts))], axis=1)
        rows = ids.reshape(*real.shape, *ids.shape[1:])
        if self.activations is None or self.tokens is None:
            self.activations = np.zeros((len(real), len(n_experts), max(n_experts)))
            self.tokens = np.zeros(len(real), np.int64)
        for at, mine in enumerate(real):
            self.activations[at] += activation_counts(rows[at][mine], max(n_experts))
            self.tokens[at] += int(mine.sum())


@contextmanager
def listening(model: nn.Module, padding: Padding) -> Iterator[None]:
    """Hooks on ``model`` and its replaced experts for the block; others are left alone."""
    from hybrimoe.experts.module import HybridExperts

    modules = [module for module in model.modules() if isinstance(module, HybridExperts)]
    n_experts = [module.num_experts for module in modules]

    def begin(module: nn.Module, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        padding.begin(dict(zip(("input_ids", "attention_mask"), arguments, strict=False)) | kwargs)

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(lambda *_: padding.finish(n_experts)),
    ]
    handles += [
        module.register_forward_pre_hook(_router_hook(padding, layer), with_kwargs=True)
        for layer, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _router_hook(padding: Padding, layer: int) -> Any:
    def hook(
        module: nn.Module, arguments: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = dict(zip(ARGUMENTS, arguments, strict=False)) | kwargs
        if given.get("top_k_index") is None:
            return None
        return (), given | {"top_k_index": padding.routed(layer, given["top_k_index"])}

    return hook
