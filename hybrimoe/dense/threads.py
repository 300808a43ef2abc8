"""How many threads torch's operators use in decode steps: one, where they have little to do.

Experts, packed linear layers and decode attention run on the team of `cpu_kernels`. What torch computes between them is
a few microseconds an operator then, for which its own pool gains nothing; and the pool's threads spin after each
operator, on cores that the team or another program needs. Prompts keep torch's number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

MAX_TOKENS = 16
"""A call of more is a prompt."""
LITTLE_BYTES = 16 << 20
"""Of weights that torch's own linear layers on the CPU read in a step: about 1 ms for one thread."""


class FewThreads:
    """Lets torch run on one thread in the model's calls of few tokens, if its linear layers are small."""

    def __init__(self, model: nn.Module) -> None:
        self.applies = torch_linear_bytes(model) <= LITTLE_BYTES
        self._before: list[int] = []
        self._handles = []
        if self.applies:
            self._handles.append(model.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._leave, always_call=True))

    def undo(self) -> None:
        """Takes the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._before.append(torch.get_num_threads())
        if self._before[-1] > 1 and 0 < n_tokens_of(args, kwargs) <= MAX_TOKENS:
            torch.set_num_threads(1)

    def _leave(self, *_: object) -> None:
        before = self._before.pop()
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def torch_linear_bytes(model: nn.Module) -> int:
    """Bytes of the weights of `nn.Linear` layers that are on the CPU."""
    layers = (module for module in model.modules() if type(module) is nn.Linear)
    return sum(layer.weight.nbytes for layer in layers if layer.weight.device.type == "cpu")


def n_tokens_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Tokens of a call of a language model; 0 where its inputs do not tell."""
    ids, embeddings = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    return embeddings.shape[:-1].numel() if isinstance(embeddings, torch.Tensor) else 0
