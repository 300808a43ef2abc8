"""Which calls of a model's forward the compiled step serves: a few new tokens behind a cache, and nothing unusual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cpu_kernels.simd.attention import LOWEST
from cpu_kernels.step.program import MAX_LOGITS, MAX_ROWS
from scheduler import Phase

SERVED = frozenset((
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict",
    "cache_position",
))  # fmt: skip
"""Arguments that are understood; others must not be there, or be None or False."""
FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits")
"""Settings of a configuration that ask for more than logits."""


@dataclass(frozen=True, slots=True)
class StepCall:
    """A call that can be served: `n_new` tokens of each sequence, which lie in one cache, or in a cache each.

    token_ids, positions: of each row, sequence by sequence. n_past: tokens that the cache holds of each sequence. mask:
    float32 [sequences, tokens] added to scores, or None. phase: as which it is counted.
    """

    token_ids: list[int]
    n_new: int
    n_past: list[int]
    caches: list[DynamicCache]
    positions: list[int]
    mask: np.ndarray | None
    n_logits: int
    phase: Phase

    @property
    def n_sequences(self) -> int:
        """Sequences of the call."""
        return len(self.n_past)

    @property
    def hides_new_tokens(self) -> bool:
        """Whether some of several new tokens are hidden from the others. (A single one is padding for nobody.)"""
        return self.mask is not None and self.n_new > 1 and bool(self.mask[:, -self.n_new :].any())


def read_call(
    config: Any, cache_type: type[DynamicCache], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> StepCall | None:
    """The call as the step sees it; None where transformers' way must answer it. cache_type: of the model's caches."""
    known = {"input_ids": args[0], **kwargs} if args else kwargs
    if len(args) > 1 or any(
        name not in SERVED and value is not None and value is not False for name, value in known.items()
    ):
        return None
    ids: Any = known.get("input_ids")
    cache: Any = known.get("past_key_values")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return None
    if not isinstance(cache, DynamicCache) or type(cache) is not cache_type or cache.offloading:
        return None
    if known.get("use_cache") is False or known.get("return_dict") is False:
        return None
    if any(getattr(config, flag, None) for flag in FLAGS) or getattr(config, "return_dict", True) is False:
        return None
    n_sequences, n_new = ids.shape
    n_past = tokens_held(cache)
    kept = known.get("logits_to_keep") or 0
    if not 0 < n_sequences * n_new <= MAX_ROWS or not n_past or not isinstance(kept, int):
        return None
    if cache.get_seq_length() != n_past and (known.get("position_ids") is None or n_new > 1):
        return None  # a first layer without tokens tells the model otherwise: MiniMax's
    n_logits = min(kept or n_new, n_new)
    if (n_logits if n_sequences == 1 else n_sequences * n_new) > MAX_LOGITS:
        return None
    positions = _positions(known.get("position_ids"), n_sequences, n_new, n_past)
    mask = _mask(known.get("attention_mask"), n_sequences, n_past + n_new)
    if positions is None or mask is False:
        return None
    phase: Phase = "decode" if n_new == 1 else "prefill"
    return StepCall(
        ids.flatten().tolist(),
        n_new,
        [n_past] * n_sequences,
        [cache],
        positions,
        mask,
        n_logits,
        phase,
    )


def tokens_held(cache: DynamicCache) -> int:
    """Tokens that a cache has seen, by its first layer that counts them: states of linear attention do not."""
    layers = (layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.is_initialized)
    return next((int(layer.get_seq_length()) for layer in layers), 0)


def _positions(given: Any, n_sequences: int, n_new: int, n_past: int) -> list[int] | None:
    if given is None:
        return list(range(n_past, n_past + n_new)) * n_sequences
    if isinstance(given, torch.Tensor) and given.dim() == 3:
        given = _along_all_axes(given)
    if not isinstance(given, torch.Tensor) or given.shape not in ((n_sequences, n_new), (1, n_new)):
        return None
    if given.is_floating_point():  # as Qwen's omni models count
        if not bool((given == given.floor()).all()):
            return None
        given = given.long()
    positions: list[int] = given.flatten().tolist()
    return positions if len(given) == n_sequences else positions * n_sequences


def _along_all_axes(given: torch.Tensor) -> torch.Tensor | None:
    """Positions [sequences, n] of tokens that stand at the same place along each axis [axes, sequences, n], as text
    does where images lie in a plane; None for others. (Of four axes the first is the number in the text.)"""
    axes = given[1:] if len(given) == 4 else given
    return axes[0] if bool((axes == axes[:1]).all()) else None


def _mask(given: Any, n_sequences: int, n_tokens: int) -> Any:
    """float32 [sequences, tokens] of a mask that hides something; None where nothing is hidden; False: not served."""
    if given is None:
        return None
    if (
        not isinstance(given, torch.Tensor)
        or tuple(given.shape) != (n_sequences, n_tokens)
        or given.is_floating_point()
    ):
        return False
    if bool(given.all()):
        return None
    return np.where(given.numpy() != 0, np.float32(0), np.float32(LOWEST))
