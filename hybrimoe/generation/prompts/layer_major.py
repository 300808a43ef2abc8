"""Prompts that pass a model layer by layer, so that an expert that is fetched once serves all of their parts.

A prompt is computed in parts that other replies need not wait long for. Where experts are read from disk, each part
reads nearly all of them again. Here all parts pass the first layer, one after another, then all pass the second, and so
on: between any two of these passes others may get a token, and of each layer the experts are read once. What waits
between layers is the hidden state of each token.

A pass is a call of the model itself, in which every other layer is left out: it returns what it is given, and the
layer behind it ends the call. So whatever the model does around its layers (embeddings, positions, masks, contexts of
its calls) is done as for the part alone, and each part has the bits that it has alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hybrimoe.generation.images.tokens import has_images
from hybrimoe.generation.kv_memory import WORK_SHARE, device_memory, reads_experts
from hybrimoe.generation.prefix.states import is_plain
from hybrimoe.kv_sizes import number_of

if TYPE_CHECKING:
    import torch

    from hybrimoe.generation.kv_cache import PrefixCache

__all__ = ["LayerMajor", "group_of"]

FEWEST_TOKENS = 64
"""Of a part: up to so many may be one compiled step, which has other bits."""

Forward = Callable[[Sequence[int], Any, int], "torch.Tensor"]
"""Logits [n, V] by the model's forward: of token ids, on top of states that hold so many tokens."""


class _Ended(Exception):  # not an error
    """A layer's output is there, and the rest of the call is not needed."""


class LayerMajor:
    """Parts of a prompt under way. parts: token ids, one after another, on top of what `cache` holds.

    Whoever does not `advance` to the end calls `give_up`.
    """

    def __init__(self, model: Any, forward: Forward, cache: PrefixCache, parts: Sequence[Sequence[int]]) -> None:
        self.parts = parts
        self._model, self._forward, self._cache = model, forward, cache
        self._layers = _layers_of(model)
        self._n_held = len(cache.token_ids)
        self.longest_us = 0.0
        """What the longest pass so far has taken."""
        self._hidden: list[torch.Tensor | None] = [None] * len(parts)
        self._passes = iter([(layer, part) for layer in range(len(self._layers)) for part in range(len(parts))])

    def advance(self) -> torch.Tensor | None:
        """One part passes one layer; returns the logits [V] after the last part once that has passed all, else None.

        Raises what the model raises; the cache is then as it was before.
        """
        began = time.perf_counter_ns()
        layer, part = next(self._passes)
        is_last_layer, is_last_part = layer == len(self._layers) - 1, part == len(self.parts) - 1
        store = self._model.hybrimoe.session.store
        try:
            store.expect_again(not is_last_part)
            logits = self._pass(layer, part, to_end=is_last_layer and is_last_part)
        except BaseException:
            self.give_up()
            raise
        finally:
            store.expect_again(False)
        self.longest_us = max(self.longest_us, (time.perf_counter_ns() - began) / 1000)
        if logits is None:
            return None
        self._cache.extended([token for ids in self.parts for token in ids], self._cache.states)
        return logits[-1]

    def give_up(self) -> None:
        """The cache holds what it held before."""
        for layer in self._cache.states.layers:
            n_new = layer.get_seq_length() - self._n_held
            if n_new:
                layer.crop(-n_new)
        self._passes = iter(())

    def _pass(self, number: int, part: int, *, to_end: bool) -> torch.Tensor | None:
        """A part passes layer `number`: its hidden states are kept for the next one; logits [n, V] of a call that goes
        to its end."""
        import copy

        states = copy.copy(self._cache.states)
        states.layers = [self._cache.states.layers[number]] * len(self._layers)  # all as long as this one is
        n_before = self._n_held + sum(map(len, self.parts[:part]))
        with self._only(number, part, to_end=to_end):
            try:
                return self._forward(self.parts[part], states, n_before)
            except _Ended:
                return None

    @contextmanager
    def _only(self, number: int, part: int, *, to_end: bool) -> Iterator[None]:
        """Within, calls of the model compute layer `number` alone, of the hidden states of a part."""
        own = self._layers[number].forward
        last = len(self._layers) - 1

        def this(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            kept = self._hidden[part]
            output = own(hidden if kept is None else kept, *args, **kwargs)
            self._hidden[part] = None if number == last else output
            if number == last and not to_end:
                raise _Ended
            return output

        def later(hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
            raise _Ended

        with _replaced(self._layers, [_unchanged] * number + [this] + [later] * (last - number)):
            yield


def group_of(model: Any, cache: PrefixCache, parts: Sequence[Sequence[int]]) -> int:
    """How many of the `parts` of a prompt, from the first on, should pass the layers together; 0 where none should:
    experts are in memory or have slots, a policy changes the routing or somebody records it, the model's layers hand
    each other more than hidden states, reading the experts again takes less time than another call of the model, or
    one part is all there is."""
    if len(parts) < 2 or not reads_experts(model) or not model.hybrimoe.session.plain:
        return 0
    config = model.config.get_text_config(decoder=True)
    row_bytes = number_of(config, "hidden_size") * model.dtype.itemsize
    left = int(device_memory(model.device)[0] * WORK_SHARE) // max(1, row_bytes)
    n_parts = 0
    for ids in parts:
        left -= len(ids)
        if len(ids) <= FEWEST_TOKENS or left < 0 or has_images(ids):
            break
        n_parts += 1
    if n_parts < 2:
        return 0
    call_us = pass_us(model, cache, len(parts[0]))
    return 0 if call_us is None or rereading_us(model) <= call_us else n_parts


def rereading_us(model: Any) -> float:
    """us for which the disk is busy with what a part reads of a layer, where the experts that memory has no room for
    are read again for each: by the rate of the reads so far; infinite where there was none."""
    cache = model.hybrimoe.session.store.cache
    busy_us, n_bytes = cache.reader.rate
    n_absent = cache.places.n_records - cache.slots.n_slots
    rate = busy_us / n_bytes if n_bytes else math.inf
    return float(n_absent * cache.slots.slot_bytes / len(cache.places.layers) * rate)


def pass_us(model: Any, cache: PrefixCache, n_tokens: int) -> float | None:
    """us that a call of the model with so many tokens takes around its layers, which each pass costs.

    None unless each layer of a model on the host keeps all of its tokens, and is called with what the layer before it
    has returned and with what no layer changes. Told by calls in which every layer returns what it is given, of which
    the second one counts.
    """
    if not _hands_on_hidden_states(model, cache, n_tokens):
        return None
    began = time.perf_counter_ns()
    again = _hands_on_hidden_states(model, cache, n_tokens)
    return (time.perf_counter_ns() - began) / 1000 if again else None


def _hands_on_hidden_states(model: Any, cache: PrefixCache, n_tokens: int) -> bool:
    import torch

    layers = _layers_of(model)
    held = list(getattr(cache.states, "layers", ()))
    if model.device.type != "cpu" or not layers or len(layers) != len(held) or not all(map(is_plain, held)):
        return False
    returned: list[Any] = []
    sound: list[bool] = []

    def noting(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        same = not returned or hidden is returned[-1]
        others = [value for name, value in kwargs.items() if name != "past_key_values"]
        sound.append(same and all(map(_stays, (*args, *others))))
        returned.append(hidden.clone())
        if len(returned) == len(layers):
            raise _Ended
        return returned[-1]

    with _replaced(layers, [noting] * len(layers)), torch.inference_mode():
        try:
            token_ids = torch.zeros(1, n_tokens, dtype=torch.long)
            model.get_decoder()(input_ids=token_ids, past_key_values=type(cache.states)(), use_cache=True)
        except _Ended:
            return len(sound) == len(layers) and all(sound)
        except Exception:  # noqa: BLE001  # whatever it wants besides: such a model is called in the usual way
            return False
    return False


def _stays(value: Any) -> bool:
    """Whether a layer cannot leave anything in an argument for the next one."""
    import torch

    if isinstance(value, tuple):
        return all(map(_stays, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))


def _unchanged(hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """In the place of a layer that was passed before."""
    return hidden


@contextmanager
def _replaced(layers: Sequence[Any], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Within, the layers compute `forwards`."""
    own = [vars(layer).get("forward") for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before


def _layers_of(model: Any) -> list[Any]:
    """The decoder layers in their order; none where the model does not name them."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    config = model.config.get_text_config(decoder=True)
    layers = list(getattr(decoder, "layers", None) or ())
    return layers if len(layers) == number_of(config, "num_hidden_layers") else []
