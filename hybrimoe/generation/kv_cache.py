"""The KV cache of a sequence, which knows the tokens it holds and reuses what the next prompt shares."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from cpu_kernels.host.memory import page_aligned
from hybrimoe.compat import takes_dynamic_cache
from hybrimoe.generation.images.forward import wants_whole_images
from hybrimoe.generation.images.tokens import ImageToken, has_images, is_inside, kept
from hybrimoe.generation.kv_memory import held_bytes, keeps_every_token
from hybrimoe.generation.prefix.blocks import BLOCK_TOKENS, Known, PrefixTree
from hybrimoe.generation.prefix.keys import n_alike
from hybrimoe.generation.prefix.reading import Reading
from hybrimoe.generation.prefix.states import (
    Checkpoint,
    checkpoint_of,
    copied,
    is_bounded,
    is_plain,
    treats_prompts,
)

if TYPE_CHECKING:
    import torch

__all__ = ["CacheRows", "PrefixCache"]

KEPT_CHECKPOINTS = 2
"""Checkpoints that a cache keeps itself: of the prompt before the last, and of the last. A model with linear attention
has some 75 MB in each."""
CHECKPOINT_TAIL_TOKENS = 8
"""A checkpoint is made so many tokens before the end of a prompt: the end is often the template's opening of the reply
(the role, an opened thinking block), which stands otherwise in the next prompt."""


class PrefixCache:
    """`states` are transformers' (None before the first token); `token_ids` are the tokens they stand for.

    A prompt that begins with the same tokens needs only its rest computed. Cached tokens beyond the shared prefix are
    cropped; where a layer cannot give back its past (a full sliding window, linear attention), the states go back to
    the last checkpoint within the shared prefix, and without one all starts anew. What `prefixes` know of the prompt
    beyond that is copied from there.

    prefixes: what other sequences computed, to which this one adds what it computes; None: it stands alone.
    number: which one it is of those of an engine.
    """

    def __init__(self, model: Any, prefixes: PrefixTree | None = None, number: int = 0) -> None:
        self._model = model
        self.number = number
        self._prefixes = prefixes
        self.states: Any = None
        self.token_ids: list[int] = []
        self._checkpoints: list[Checkpoint] = []
        self._known = Known()
        self._reading: Reading | None = None
        self._whole_images = wants_whole_images(model)
        self._shift = (0, 0)
        """Of so many tokens: by how much their images move the positions of what follows."""
        self.n_read = 0
        """Tokens of the latest prompt that came from disk."""

    def n_shared(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens `prompt_ids` and the cache begin with alike."""
        return n_alike(self.token_ids, prompt_ids)

    def n_shifted(self) -> int:
        """By how many positions the images of the tokens move the text behind them, for models that give the tokens of
        an image positions in a plane."""
        n_known, shift = self._shift
        for token in self.token_ids[n_known:]:
            if type(token) is ImageToken and token.place == token.picture.n_tokens - 1:
                shift += token.picture.n_positions - token.picture.n_tokens
        self._shift = len(self.token_ids), shift
        return shift

    def has_read(self, prompt_ids: Sequence[int], wait_s: float) -> bool:
        """Whether all that the disk has of a prompt and memory has not is in memory now, so that `reuse` finds it.

        The first call of a prompt begins to read; each waits so long at most, and brings what has come into the cache
        meanwhile.
        """
        if self._prefixes is None:
            return True
        if self._reading is None or self._reading.prompt_ids is not prompt_ids:
            if self._reading is not None:
                self._reading.give_up()
            self.n_read = 0
            self._reading = self._prefixes.begin_reading(prompt_ids, self.n_shared(prompt_ids))
        end = time.monotonic() + wait_s
        while self._reading is not None:
            if self._reading.waits(max(0.0, end - time.monotonic())):
                return False
            self.n_read += self._prefixes.take_up(self._reading)
            if self._reading.has_ended:
                self._reading = None
            elif self._prefixes.holds_every_token and not has_images(prompt_ids):
                self._fit(prompt_ids, self._prefixes.taken_up(self._reading), threads=1)  # the others read
        return True

    def reuse(self, prompt_ids: Sequence[int], *, anew: bool = False) -> int:
        """Fit the cache to `prompt_ids`; returns how many of its tokens need no computing: at most all but one, or all
        where `known_logits` are those after the last.

        anew: each token is to be computed.
        """
        known = Known() if self._prefixes is None or anew else self._prefixes.look_up(prompt_ids)
        return self._fit(prompt_ids, known, anew=anew)

    def _fit(
        self, prompt_ids: Sequence[int], known: Known, *, anew: bool = False, threads: int | None = None
    ) -> int:  # fmt: skip
        """As `reuse`, of what is `known`; threads: that copy."""
        self._known = Known() if self._cuts_an_image(prompt_ids, known.n_tokens) else known
        most = len(prompt_ids) - (self._known.n_tokens < len(prompt_ids))
        shared = 0 if anew else min(self.n_shared(prompt_ids), most)
        while self._cuts_an_image(prompt_ids, shared):
            shared -= 1
        n_kept = 0 if self._knows_its_prompt() else self._kept(shared)
        if n_kept <= 0:
            n_kept = 0
            self._begin_anew()
        del self.token_ids[n_kept:]
        self._shift = (0, 0)
        self._checkpoints = [point for point in self._checkpoints if point.n_tokens <= n_kept]
        if self._known.n_tokens > n_kept:
            self._copy_known(prompt_ids, threads)
        return len(self.token_ids)

    def known_logits(self) -> torch.Tensor:
        """Logits [V] after the prompt, of which `reuse` has given all tokens."""
        assert self._known.checkpoint is not None
        logits: torch.Tensor = self._known.checkpoint.logits
        return logits.to(self._model.device, copy=True)

    def checkpoint_places(self, n_prompt: int) -> list[int]:
        """After how many tokens of the prompt of `n_prompt` tokens that is computed next `checkpoint` is to be called.

        Shortly before its end, and where it parts from what an earlier sequence computed: others will part there, too.
        """
        if not self.needs_checkpoints:
            return []
        end, held = n_prompt - CHECKPOINT_TAIL_TOKENS, len(self.token_ids)
        parting = self._known.n_seen if self._known.n_seen >= held + BLOCK_TOKENS else 0
        return [place for place in (parting, end) if held < place <= end]

    @property
    def needs_checkpoints(self) -> bool:
        """Whether a layer cannot give back its past."""
        return not self._knows_its_prompt() and any(is_bounded(layer) for layer in self._layers())

    def checkpoint(self) -> None:
        """Remember the states as they are now, where cropping could not bring them back."""
        if self.needs_checkpoints and self.token_ids:
            self._checkpoints.append(checkpoint_of(len(self.token_ids), self._layers()))
            del self._checkpoints[:-KEPT_CHECKPOINTS]

    def share_part(self) -> None:
        """Others may use what was computed so far: whole blocks, because more tokens follow."""
        self._share(self._checkpoints, with_end=False)

    def share_prompt(self, logits: Any) -> None:
        """The prompt is complete, with these logits [V] after it, which the same prompt need not compute again."""
        checkpoints = self._checkpoints
        if self._prefixes is not None and self.n_read:
            self._prefixes.end_readiness()
        if self._prefixes is not None and not self.needs_checkpoints:
            from gpu_kernels.waiting import wait_for_stream

            wait_for_stream(logits.device, "the model's output")
            checkpoints = [Checkpoint(len(self.token_ids), {}, logits.to("cpu", copy=True))]
        self._share(checkpoints, with_end=True)

    def share_reply(self) -> None:
        """The reply is complete, too; the states of its end are those from which the next prompt goes on."""
        if self._prefixes is not None:
            self.checkpoint()
            self._share(self._checkpoints, with_end=True, lasting=True)

    def _share(self, checkpoints: Sequence[Checkpoint], *, with_end: bool, lasting: bool = False) -> None:
        if self._prefixes is not None and self.token_ids and not self._knows_its_prompt():
            self._prefixes.keep(self.token_ids, self._layers(), checkpoints, with_end=with_end, lasting=lasting)

    def announce(self, n_tokens: int) -> None:
        """The prompt that is computed next, perhaps in several chunks, has `n_tokens`.

        Layers that keep the whole prompt and only a window of the reply (reference sliding-window attention) take the
        first chunk for the prompt unless they are told. Those that keep every token find room for all of it at once.
        """
        from hybrimoe.generation.growing import GrowingLayer

        for layer in self._layers():
            if isinstance(layer, GrowingLayer):
                layer.expected = n_tokens
        for layer in self._layers_that_ask():
            layer.set_prefill_length(n_tokens)

    def _layers_that_ask(self) -> list[Any]:
        return [layer for layer in getattr(self.states, "layers", ()) if treats_prompts(layer)]

    def _knows_its_prompt(self) -> bool:
        """Whether a layer treats the tokens of its first prompt in another way, so that no second one can follow."""
        return bool(self._layers_that_ask())

    def extended(self, token_ids: Sequence[int], states: Any) -> None:
        """Record that `token_ids` were computed on top, and the `states` which the model returned."""
        self.states = states
        self.token_ids.extend(kept(token_ids) if has_images(token_ids) else token_ids)

    def drop_last(self, n_tokens: int) -> None:
        """Take back the last tokens of the latest step, which the compiled step computed (its layers can do that)."""
        for layer in self._layers():
            layer.retract(n_tokens)
        del self.token_ids[-n_tokens:]
        self._shift = (0, 0)

    def clear(self) -> None:
        """Forget everything, and free its memory; the next prompt is computed from its first token."""
        self.token_ids.clear()
        self._shift = (0, 0)
        self._checkpoints.clear()
        self.states = self._new_states()

    def keys_and_values(self) -> list[tuple[Any, Any]] | None:
        """Of each layer, [1, heads, tokens, row] as it stores them; None where one keeps something else, where nothing
        is held, and of tokens of images, whose numbers do not tell what they show."""
        layers = self._layers()
        whole = [is_plain(layer) and layer.get_seq_length() == len(self.token_ids) for layer in layers]
        if not self.token_ids or not layers or not all(whole) or self._knows_its_prompt() or has_images(self.token_ids):
            return None
        return [(layer.keys, layer.values) for layer in layers]

    def take_up(self, token_ids: Sequence[int], held: Sequence[tuple[Any, Any]]) -> bool:
        """Hold what `keys_and_values` gave for `token_ids`; False, and nothing is held, where the model has others."""
        import torch

        from hybrimoe.generation.stored import can_hold

        self.clear()
        layers = self._layers()
        if len(layers) != len(held) or not all(is_plain(layer) for layer in layers):
            return False
        if not all(can_hold(layer, rows) for layer, pair in zip(layers, held, strict=True) for rows in pair):
            return False
        with torch.inference_mode():
            for layer, (keys, values) in zip(layers, held, strict=True):
                layer.append([(keys.to(self._model.device), values.to(self._model.device))], len(token_ids))
        self.token_ids.extend(token_ids)
        return True

    def forget(self) -> None:
        """As `clear`, and nobody else may use what was computed, as far as no other text goes on from there."""
        if self._prefixes is not None:
            self._prefixes.forget(self.token_ids)
        self.clear()

    def n_bytes(self) -> int:
        """Memory that states and checkpoints take."""
        saved = [layer for point in self._checkpoints for layer in point.layers.values()]
        return held_bytes([*self._layers(), *saved])

    def growing_layers(self) -> list[Any]:
        """The layers that keep every token, once they hold some."""
        return [layer for layer in self._layers() if keeps_every_token(layer) and layer.get_seq_length()]

    def _layers(self) -> list[Any]:
        return list(getattr(self.states, "layers", ()))

    def _begin_anew(self) -> None:
        """Hold nothing; memory that can be written again stays, and what was recorded for it (graphs) with it."""
        layers = self._layers()
        if layers and all(is_plain(layer) and layer.get_seq_length() == len(self.token_ids) for layer in layers):
            for layer in layers:
                layer.crop(-len(self.token_ids))
            self.token_ids.clear()
            self._checkpoints.clear()
        else:
            self.clear()

    def _copy_known(self, prompt_ids: Sequence[int], threads: int | None) -> None:
        """Add what the prefixes know of the prompt to what is held of it."""
        import torch

        known, device, first = self._known, self._model.device, len(self.token_ids)
        memory = page_aligned if self._prefixes is None else self._prefixes.memory
        with torch.inference_mode():
            for index, layer in enumerate(self.states.layers):
                if index in known.blocks[0].held:
                    parts = known.parts(index, first)
                    if device.type != "cpu":
                        parts = ((keys.to(device), values.to(device)) for keys, values in parts)
                    layer.append(parts, len(prompt_ids), threads, memory)
            for index, layer in known.checkpoint.layers.items() if known.checkpoint is not None else ():
                self.states.layers[index] = copied(layer, device)
        self.token_ids.extend(kept(prompt_ids[first : known.n_tokens]))

    def _cuts_an_image(self, prompt_ids: Sequence[int], n_tokens: int) -> bool:
        """Whether a picture that must be computed at once would be computed from its middle on."""
        if not self._whole_images or not 0 < n_tokens < len(prompt_ids):
            return False
        return is_inside(prompt_ids[n_tokens])

    def _new_states(self) -> Any:
        if not takes_dynamic_cache(self._model):
            return None  # the model makes its own kind in its first call
        from hybrimoe.generation.stored import new_cache

        return new_cache(self._model)

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
                self.states.layers[index] = copied(point.layers[index], self._model.device)
            else:
                layer.crop(point.n_tokens - len(self.token_ids))
        return point.n_tokens


class CacheRows:
    """The caches in which replies are computed, each of which serves one reply at a time, by their numbers from 0 on.

    An idle one keeps what it holds: a prompt that goes on from there needs no copy, and no new memory.
    """

    def __init__(self, model: Any, n_rows: int, prefixes: PrefixTree | None = None) -> None:
        self._model, self._prefixes = model, prefixes
        self._idle: dict[PrefixCache, int] = {}
        """The idle ones, the longest idle first, and the bytes that each takes."""
        self._taken: set[int] = set()
        """Numbers of the others."""
        self._numbers: tuple[int, ...] = ()
        self.idle_bytes = 0
        """Memory of the idle ones, which any thread may read."""
        self.resize(n_rows)

    def resize(self, n_idle: int) -> None:
        """So many idle ones: new ones are empty, with the lowest numbers that are free, and the highest numbers go."""
        missing = n_idle - len(self._idle)
        numbers = self._taken | {cache.number for cache in self._idle}
        free = (number for number in count() if number not in numbers)
        added = [PrefixCache(self._model, self._prefixes, number) for number in islice(free, max(0, missing))]
        gone = sorted(cache.number for cache in self._idle)[n_idle:]
        left = {cache: n_bytes for cache, n_bytes in self._idle.items() if cache.number not in gone}
        self._idle = dict.fromkeys(added, 0) | left
        self._numbers = tuple(sorted(self._taken | {cache.number for cache in self._idle}))
        self._count()

    @property
    def taken(self) -> dict[int, bool]:
        """Of each cache, by number, whether it is not idle. Any thread may ask."""
        return {number: number in self._taken for number in self._numbers}

    def take(self, prompt_ids: Sequence[int], number: int | None = None) -> tuple[PrefixCache, int]:
        """An idle cache, and the bytes that it takes; there must be one. The one with this number, else that in which
        most is shared and least lost, of equals the longest idle."""

        def gain(cache: PrefixCache) -> tuple[bool, int]:
            shared = cache.n_shared(prompt_ids)
            return cache.number == number, shared - (len(cache.token_ids) - shared)

        chosen = max(self._idle, key=gain)
        n_bytes = self._idle.pop(chosen)
        self._taken.add(chosen.number)
        self._count()
        return chosen, n_bytes

    def give_back(self, cache: PrefixCache) -> None:
        """The reply in `cache` has ended."""
        self._taken.discard(cache.number)
        self._idle[cache] = cache.n_bytes()
        self._count()

    def shrink(self, max_bytes: int) -> None:
        """Let idle caches, the longest idle first, forget what they hold until they take no more than `max_bytes`."""
        for cache in self._idle:
            if self.idle_bytes <= max_bytes:
                return
            cache.clear()
            self._idle[cache] = cache.n_bytes()
            self._count()

    def _count(self) -> None:
        self.idle_bytes = sum(self._idle.values())


def _can_crop(layer: Any) -> bool:
    """Whether a layer can drop its last tokens now: a sliding window can until it is full."""
    if getattr(layer, "is_sliding", False) and not hasattr(layer, "conv_states"):
        return bool(layer.get_seq_length() < layer.sliding_window)
    return not is_bounded(layer)
