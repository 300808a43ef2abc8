"""States that layers of a cache keep in place of keys and values: where they are found, begun, bound and exchanged.

transformers' layers have two of them: the last inputs of a convolution over time, and the matrices of linear attention,
in tensors that each token changes. MiniMax's own cache keeps matrices in a list beside its layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from cpu_kernels.step.compiled import StatePlace
from cpu_kernels.step.stored import KIND_OF

KINDS = {torch.float32: KIND_OF["float32"], torch.bfloat16: KIND_OF["bfloat16"]}
"""How the step reads and writes states, by their dtype."""


class States(NamedTuple):
    """inputs [B, channels, taps], the newest last; matrices [B, heads, rows, columns]. None: the layer has none."""

    inputs: torch.Tensor | None
    matrices: torch.Tensor | None

    def on_meta(self) -> States:
        """The same shapes and dtypes of one sequence, without memory."""
        return States(*(None if part is None else torch.empty_like(part[:1], device="meta") for part in self))

    def copy(self) -> States:
        """The same values in memory of their own."""
        return States(*(None if part is None else part.clone() for part in self))

    def spare(self) -> States:
        """Memory for the same, in which anything may stand. Whoever has it may write to it outside inference mode."""
        with torch.inference_mode(mode=False):
            made = (None if part is None else torch.empty(part.shape, dtype=part.dtype) for part in self)
            return States(*made)

    def can_be_given_away(self) -> bool:
        """Whether another cache may have these tensors: torch lets nobody write to those of inference mode outside."""
        return not any(part is not None and part.is_inference() for part in self)

    def are_like(self, other: States, n_sequences: int) -> bool:
        """Whether these are states of n_sequences in host memory, otherwise of the shapes and dtypes of `other`."""
        return all(
            one is two
            if one is None or two is None
            else one.shape == (n_sequences, *two.shape[1:])
            and one.dtype == two.dtype
            and one.device.type == "cpu"
            and one.is_contiguous()
            for one, two in zip(self, other, strict=True)
        )

    def places(self) -> tuple[int, int]:
        """Addresses of both."""
        return tuple(0 if part is None else part.data_ptr() for part in self)  # type: ignore[return-value]


def states_of(cache: Any, number: int) -> States | None:
    """The states of a layer that has seen tokens and keeps nothing else; None of others."""
    layer: Any = cache.layers[number] if number < len(cache.layers) else None
    if type(layer) is LinearAttentionLayer:
        seen = layer.number_of_states == 1 and not layer.record_past and layer.has_previous_state[0]
        return States(layer.conv_states[0], layer.recurrent_states[0]) if seen else None
    beside = getattr(cache, "linear_cache", ())
    held = beside[number] if number < len(beside) else None
    if not isinstance(held, torch.Tensor) or (isinstance(layer, DynamicLayer) and layer.is_initialized):
        return None
    return States(None, held)


def put_states(cache: Any, number: int, states: States) -> None:
    """Others in the place of those that `states_of` gives."""
    layer: Any = cache.layers[number] if number < len(cache.layers) else None
    if type(layer) is LinearAttentionLayer:
        layer.conv_states[0], layer.recurrent_states[0] = states
    else:
        cache.linear_cache[number] = states.matrices


def begin_states(cache: Any, number: int, like: States, n_sequences: int = 1) -> None:
    """Gives a layer without tokens the states that it has before the first one: zeros, otherwise like `like`."""
    layer: Any = cache.layers[number] if number < len(cache.layers) else None
    if type(layer) is not LinearAttentionLayer or layer.number_of_states != 1 or any(layer.has_previous_state.values()):
        return
    inputs, matrices = (
        None if part is None else torch.zeros((n_sequences, *part.shape[1:]), dtype=part.dtype) for part in like
    )
    layer.lazy_initialization(conv_states=inputs, recurrent_states=matrices)
    layer.has_previous_state[0] = True


def place_of_states(read: States, written: States, row: int) -> StatePlace:
    """Where the step reads the states of sequence `row`, and where it writes them."""
    return StatePlace(*(_place(one, other, row) for one, other in zip(read, written, strict=True)))


def _place(read: torch.Tensor | None, written: torch.Tensor | None, row: int) -> tuple[int, int, int]:
    if read is None or written is None:
        return 0, 0, 0
    at = row * read.stride(0) * read.element_size()
    return read.data_ptr() + at, written.data_ptr() + at, KINDS[read.dtype]


def spoil(states: States) -> None:
    """After a step that failed while it changed them: what goes on from here fails, too, instead of being wrong."""
    with torch.inference_mode():
        for part in states:
            if part is not None:
                part.fill_(torch.nan)
