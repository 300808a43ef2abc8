"""KV caches of conversations, which know the tokens they hold and reuse what the next prompt shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["PrefixCache", "PrefixCaches"]

KEPT_SHARE = 0.5
"""A prompt that shares less of a conversation than this does not crop it: it is another one's beginning."""


class PrefixCache:
    """`states` are transformers' (None before the first token); `token_ids` are the tokens they stand for.

    A prompt that begins with the same tokens needs only its rest computed. Cached tokens beyond the shared prefix are
    cropped; where a layer cannot give back its past (a full sliding window, linear attention), all starts anew.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.states: Any = None
        self.token_ids: list[int] = []

    def n_shared(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens `prompt_ids` and the cache begin with alike."""
        return _common_prefix(self.token_ids, prompt_ids)

    def reuse(self, prompt_ids: Sequence[int]) -> int:
        """Fit the cache to `prompt_ids`; returns how many of its tokens need no computing (at most all but one)."""
        shared = min(self.n_shared(prompt_ids), len(prompt_ids) - 1)
        if shared <= 0 or self._knows_its_prompt() or not self._crop(len(self.token_ids) - shared):
            self.clear()
            return 0
        del self.token_ids[shared:]
        return shared

    def announce(self, n_tokens: int) -> None:
        """The prompt that is computed next, perhaps in several chunks, has `n_tokens`.

        Layers that keep the whole prompt and only a window of the reply (reference sliding-window attention) take the
        first chunk for the prompt unless they are told.
        """
        for layer in self._layers_that_ask():
            layer.set_prefill_length(n_tokens)

    def _layers_that_ask(self) -> list[Any]:
        return [layer for layer in getattr(self.states, "layers", ()) if hasattr(layer, "set_prefill_length")]

    def _knows_its_prompt(self) -> bool:
        """Whether a layer treats the tokens of its first prompt in another way, so that no second one can follow."""
        return bool(self._layers_that_ask())

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
        from hybrimoe.generation.growing import growing_cache

        return growing_cache(self._model.config.get_text_config(decoder=True))

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


class PrefixCaches:
    """Caches of the `n_conversations` latest conversations, so that users who take turns do not undo each other's.

    max_tokens: what all of them may hold together with the prompt that is answered; the least recent are cleared first.
    """

    def __init__(self, model: Any, n_conversations: int, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._caches = [PrefixCache(model) for _ in range(n_conversations)]

    def for_prompt(self, prompt_ids: Sequence[int]) -> PrefixCache:
        """The cache to answer `prompt_ids` with; from now on it is the most recent one.

        The conversation that it continues: of those of which it keeps KEPT_SHARE or more, the one that it shares most
        with, of equals the most recent. Else an empty cache, else the least recent one.
        """
        continued = [cache for cache in self._caches if cache.n_shared(prompt_ids) > KEPT_SHARE * len(cache.token_ids)]
        empty = [cache for cache in self._caches if not cache.token_ids]
        if continued:
            chosen = max(continued, key=lambda cache: (cache.n_shared(prompt_ids), self._caches.index(cache)))
        else:
            chosen = (empty or self._caches)[0]
        self._caches.remove(chosen)
        self._caches.append(chosen)
        self._make_room(len(prompt_ids))
        return chosen

    def _make_room(self, n_tokens: int) -> None:
        """Clear the least recent conversations until `n_tokens` fit beside what the others hold."""
        *idle, _ = self._caches
        held = sum(len(cache.token_ids) for cache in idle)
        for cache in idle:
            if held + n_tokens <= self.max_tokens:
                return
            held -= len(cache.token_ids)
            cache.clear()


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
