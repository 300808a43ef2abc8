"""The KV cache of one conversation, which knows the tokens it holds and reuses what the next prompt shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["PrefixCache"]


class PrefixCache:
    """`states` are transformers' (None before the first token); `token_ids` are the tokens they stand for.

    A prompt that begins with the same tokens needs only its rest computed. Cached tokens beyond the shared prefix are
    cropped; where a layer cannot give back its past (a full sliding window, linear attention), all starts anew.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.states: Any = None
        self.token_ids: list[int] = []

    def reuse(self, prompt_ids: Sequence[int]) -> int:
        """Fit the cache to `prompt_ids`; returns how many of its tokens need no computing (at most all but one)."""
        shared = _common_prefix(self.token_ids, prompt_ids)
        shared = min(shared, len(prompt_ids) - 1)
        if shared <= 0 or not self._crop(len(self.token_ids) - shared):
            self.clear()
            return 0
        del self.token_ids[shared:]
        return shared

    def extended(self, token_ids: Sequence[int], states: Any) -> None:
        """Record that `token_ids` were computed on top, and the `states` which the model returned."""
        self.states = states
        self.token_ids.extend(token_ids)

    def clear(self) -> None:
        """Forget everything; the next prompt is computed from its first token."""
        self.token_ids.clear()
        self.states = self._new_states()

    def _new_states(self) -> Any:
        if not self._model._supports_default_dynamic_cache():
            return None  # the model makes its own kind in its first call
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config.get_text_config(decoder=True))

    def _crop(self, n_tokens: int) -> bool:
        """Drop the last `n_tokens`; False where the states cannot give back their past."""
        if n_tokens == 0:
            return True
        if not hasattr(self.states, "crop"):
            return False
        try:
            self.states.crop(-n_tokens)
        except (RuntimeError, NotImplementedError, ValueError):
            return False
        return bool(self.states.get_seq_length() == len(self.token_ids) - n_tokens)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
