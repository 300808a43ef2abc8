"""KV caches of conversations, which know the tokens they hold and reuse what the next prompt shares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe.compat import takes_dynamic_cache
from hybrimoe.generation.kv_memory import held_bytes, keeps_every_token

__all__ = ["PrefixCache", "PrefixCaches"]

KEPT_SHARE = 0.5
"""A prompt that shares less of a conversation than this does not crop it: it is another one's beginning."""
KEPT_CHECKPOINTS = 2
"""Checkpoints that a conversation keeps: of the prompt before the last, and of the last. A model with linear attention
has some 75 MB in each."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """States after `n_tokens`, of the layers that cannot give back their past: index in the cache to copied layer."""

    n_tokens: int
    layers: dict[int, Any]


class PrefixCache:
    """`states` are transformers' (None before the first token); `token_ids` are the tokens they stand for.

    A prompt that begins with the same tokens needs only its rest computed. Cached tokens beyond the shared prefix are
    cropped; where a layer cannot give back its past (a full sliding window, linear attention), the states go back to
    the last checkpoint within the shared prefix, and without one all starts anew.

    on_growth: called with this cache before tokens are added, with their number.
    """

    def __init__(
        self, model: Any, on_growth: Callable[[PrefixCache, int], None] = lambda cache, n_tokens: None
    ) -> None:
        self._model = model
        self._on_growth = on_growth
        self.states: Any = None
        self.token_ids: list[int] = []
        self._checkpoints: list[Checkpoint] = []

    def n_shared(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens `prompt_ids` and the cache begin with alike."""
        return _common_prefix(self.token_ids, prompt_ids)

    def reuse(self, prompt_ids: Sequence[int]) -> int:
        """Fit the cache to `prompt_ids`; returns how many of its tokens need no computing (at most all but one)."""
        shared = min(self.n_shared(prompt_ids), len(prompt_ids) - 1)
        kept = 0 if self._knows_its_prompt() else self._kept(shared)
        if kept <= 0:
            self.clear()
            return 0
        del self.token_ids[kept:]
        self._checkpoints = [point for point in self._checkpoints if point.n_tokens <= kept]
        return kept

    @property
    def needs_checkpoints(self) -> bool:
        """Whether a layer cannot give back its past."""
        return not self._knows_its_prompt() and any(_is_bounded(layer) for layer in self._layers())

    def checkpoint(self) -> None:
        """Remember the states as they are now, where cropping could not bring them back."""
        bounded = {index: layer for index, layer in enumerate(self._layers()) if _is_bounded(layer)}
        if bounded and self.token_ids:
            layers = {index: _copied(layer) for index, layer in bounded.items()}
            self._checkpoints.append(Checkpoint(len(self.token_ids), layers))
            del self._checkpoints[:-KEPT_CHECKPOINTS]

    def growing(self, n_tokens: int) -> None:
        """`n_tokens` are about to be computed on top."""
        self._on_growth(self, n_tokens)

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

    def drop_last(self, n_tokens: int) -> None:
        """Take back the last tokens of the latest step, which the compiled step computed (its layers can do that)."""
        for layer in self._layers():
            layer.retract(n_tokens)
        del self.token_ids[-n_tokens:]

    def clear(self) -> None:
        """Forget everything; the next prompt is computed from its first token."""
        self.token_ids.clear()
        self._checkpoints.clear()
        self.states = self._new_states()

    def keys_and_values(self) -> list[tuple[Any, Any]] | None:
        """Of each layer, [1, heads, tokens, D]; None where a layer keeps something else, or nothing is held."""
        layers = self._layers()
        whole = [keeps_every_token(layer) and layer.get_seq_length() == len(self.token_ids) for layer in layers]
        if not self.token_ids or not layers or not all(whole) or self._knows_its_prompt():
            return None
        return [(layer.keys, layer.values) for layer in layers]

    def take_up(self, token_ids: Sequence[int], held: Sequence[tuple[Any, Any]]) -> bool:
        """Hold what `keys_and_values` gave for `token_ids`; False, and nothing is held, where the model has others."""
        import torch

        self.clear()
        layers = self._layers()
        if len(layers) != len(held) or not all(keeps_every_token(layer) for layer in layers):
            return False
        with torch.inference_mode():
            for layer, (keys, values) in zip(layers, held, strict=True):
                layer.update(keys.to(self._model.device), values.to(self._model.device))
        self.token_ids.extend(token_ids)
        return True

    def n_bytes(self) -> int:
        """Memory that states and checkpoints take."""
        saved = [layer for point in self._checkpoints for layer in point.layers.values()]
        return held_bytes([*self._layers(), *saved])

    def growing_layers(self) -> list[Any]:
        """The layers that keep every token, once they hold some."""
        return [layer for layer in self._layers() if keeps_every_token(layer) and layer.get_seq_length()]

    def _layers(self) -> list[Any]:
        return list(getattr(self.states, "layers", ()))

    def _new_states(self) -> Any:
        if not takes_dynamic_cache(self._model):
            return None  # the model makes its own kind in its first call
        from hybrimoe.generation.growing import growing_cache

        return growing_cache(self._model.config.get_text_config(decoder=True))

    def _kept(self, shared: int) -> int:
        """Bring the states back to `shared` tokens or, where they cannot be cropped, to a checkpoint before; returns
        the tokens that they hold then."""
        n_dropped = len(self.token_ids) - shared
        if shared <= 0 or n_dropped == 0:
            return shared
        if all(_can_crop(layer) for layer in self._layers()):
            return shared if self._crop(n_dropped) else 0
        within = [point for point in self._checkpoints if point.n_tokens <= shared]
        return self._restore(within[-1]) if within else 0

    def _crop(self, n_tokens: int) -> bool:
        """Drop the last `n_tokens`; False where the states refuse, and are then no longer whole."""
        if not hasattr(self.states, "crop"):
            return False
        try:
            self.states.crop(-n_tokens)
        except (RuntimeError, NotImplementedError, ValueError):
            return False
        return bool(self.states.get_seq_length() == len(self.token_ids) - n_tokens)

    def _restore(self, point: Checkpoint) -> int:
        """States as they were at the checkpoint, which stays as it is; returns its number of tokens."""
        for index, layer in enumerate(self.states.layers):
            if index in point.layers:
                self.states.layers[index] = _copied(point.layers[index])
            else:
                layer.crop(point.n_tokens - len(self.token_ids))
        return point.n_tokens


class PrefixCaches:
    """Caches of the latest conversations, so that users who take turns do not undo each other's.

    n_conversations: how many are kept at most. max_bytes: what they may take together, the one that is answered among
    them; token_bytes: tells what a further token takes. What goes first is small and old: the least tokens for the
    number of prompts since its last use, because tokens are what it takes to compute it again. Caches that are held are
    those of replies under way: no other prompt gets them, and they are not cleared.
    """

    def __init__(
        self, model: Any, n_conversations: int, max_bytes: int | None = None,
        token_bytes: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self._max_bytes = max_bytes
        self._token_bytes = token_bytes
        self._caches = [PrefixCache(model, self._make_room) for _ in range(n_conversations)]
        self._last_use = [0] * n_conversations
        self._idle_bytes = [0] * n_conversations
        self._clock = 0
        self._held: set[int] = set()

    def hold(self, cache: PrefixCache) -> None:
        """A reply is computed in `cache` until it is released."""
        self._held.add(self._caches.index(cache))

    def release(self, cache: PrefixCache) -> None:
        """The reply in `cache` has ended; what it holds may be continued, or make room."""
        index = self._caches.index(cache)
        self._held.discard(index)
        self._idle_bytes[index] = cache.n_bytes()

    def n_bytes(self) -> int:
        """Memory of all: of those under way as many bytes as their tokens take. Any thread may ask."""
        held = set(self._held)
        idle = sum(n for index, n in enumerate(self._idle_bytes) if index not in held)
        return idle + self._token_bytes() * sum(len(self._caches[index].token_ids) for index in held)

    def for_prompt(self, prompt_ids: Sequence[int]) -> PrefixCache:
        """The cache to answer `prompt_ids` with.

        The conversation that it continues: of those of which it keeps KEPT_SHARE or more, the one that it shares most
        with, of equals the most recent. Else an empty cache, else that of the conversation which is worth least. One
        that is held is never given; one must be free.
        """
        self._clock += 1
        chosen = self._choose(prompt_ids)
        self._idle_bytes = [cache.n_bytes() for cache in self._caches]
        self._last_use[chosen] = self._clock
        return self._caches[chosen]

    def _choose(self, prompt_ids: Sequence[int]) -> int:
        free = [index for index in range(len(self._caches)) if index not in self._held]
        shared = {index: self._caches[index].n_shared(prompt_ids) for index in free}
        continued = [index for index in free if shared[index] > KEPT_SHARE * len(self._caches[index].token_ids)]
        if continued:
            return max(continued, key=lambda index: (shared[index], self._last_use[index]))
        return min(free, key=self._worth)

    def _worth(self, index: int) -> tuple[float, int]:
        age = self._clock - self._last_use[index]
        return len(self._caches[index].token_ids) / max(age, 1), self._last_use[index]

    def _make_room(self, active: PrefixCache, n_tokens: int) -> None:
        """Clear idle conversations until `n_tokens` more fit beside what the others hold."""
        if self._max_bytes is None:
            return
        from hybrimoe.generation.growing import LEAST_ROOM

        busy = self._held | {self._caches.index(active)}
        held_tokens = sum(len(self._caches[index].token_ids) + LEAST_ROOM for index in busy)
        needed = self._token_bytes() * (held_tokens + n_tokens)
        idle = [index for index, cache in enumerate(self._caches) if index not in busy and cache.token_ids]
        for index in sorted(idle, key=self._worth):
            if needed + sum(self._idle_bytes[other] for other in idle) <= self._max_bytes:
                return
            self._caches[index].clear()
            self._idle_bytes[index] = 0


def _is_bounded(layer: Any) -> bool:
    """Whether a layer keeps states that are not those of every token: it cannot be cropped at any."""
    return bool(vars(layer)) and not keeps_every_token(layer)


def _can_crop(layer: Any) -> bool:
    """Whether a layer can drop its last tokens now: a sliding window can until it is full."""
    if getattr(layer, "is_sliding", False) and not hasattr(layer, "conv_states"):
        return bool(layer.get_seq_length() < layer.sliding_window)
    return not _is_bounded(layer)


def _copied(layer: Any) -> Any:
    """A cache layer with tensors of its own."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        setattr(twin, name, _copied_value(value))
    return twin


def _copied_value(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied_value(item) for key, item in value.items()}
    return [_copied_value(item) for item in value] if isinstance(value, list) else value


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
