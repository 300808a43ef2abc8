"""How many threads torch's operators use in decode steps: one, where they have little to do.

Experts, packed linear layers and decode attention run on the team of `cpu_kernels`. What torch computes between them is
a few microseconds an operator then, for which its own pool gains nothing; and the pool's threads spin after each
operator, on cores that the team or another program needs. The same holds between the steps of `model.generate`, where
the next token is chosen: there the spinning threads took 18 to 28 % of the next step (OLMoE shape, 8 layers, int4, 2
cores). Prompts keep torch's number of threads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import update_wrapper
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import nn

from cpu_kernels.host.threads import torch_threads
from hybrimoe.errors import ModelError

MAX_TOKENS = 16
"""A call of more is a prompt."""
LITTLE_BYTES = 16 << 20
"""Of weights that torch's own linear layers on the CPU read in a step: about 1 ms for one thread."""


class FewThreads:
    """Lets torch run on one thread in the model's calls of few tokens, and between the calls of its `generate`, if its
    linear layers are small."""

    def __init__(self, model: nn.Module) -> None:
        self.applies = torch_linear_bytes(model) <= LITTLE_BYTES
        self.prompt_threads = 0
        """Inside `generate`: torch's number of threads outside, which prompts get."""
        self._model = model
        self._before: list[int] = []
        self._handles = []
        self._generate: FewThreadsGenerate | None = None
        if self.applies:
            self._handles.append(model.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._leave, always_call=True))
            if hasattr(model, "generate") and "generate" not in model.__dict__:
                self._generate = model.__dict__["generate"] = FewThreadsGenerate(model, model.generate, self)

    def undo(self) -> None:
        """Takes the hooks out of the model, and gives it its `generate` back where nobody else has put another."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._generate is not None and self._model.__dict__.get("generate") is self._generate:
            del self._model.__dict__["generate"]

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():  # a compiled graph runs its own threads, and cannot set torch's
            return
        before = torch.get_num_threads()
        self._before.append(before)
        wanted = 1 if 0 < n_tokens_of(args, kwargs) <= MAX_TOKENS else self.prompt_threads or before
        if wanted != before:
            torch.set_num_threads(wanted)

    def _leave(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        before = self._before.pop()
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


class FewThreadsGenerate:
    """Stands as `generate` on a model: its own, on one thread of torch but for prompts."""

    def __init__(self, model: nn.Module, own: Any, few: FewThreads) -> None:
        self._model = model
        self._own = own
        self._few = few
        update_wrapper(self, own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        few = self._few
        if few.prompt_threads:  # `generate` inside `generate`, or in another thread
            return self._own(*args, **kwargs)
        few.prompt_threads = torch.get_num_threads()
        try:
            with torch_threads(1):
                return self._own(*args, **kwargs)
        finally:
            few.prompt_threads = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model generates with its own calls."""
        copied = memo.get(id(self._model))
        if copied is None:
            return self
        return FewThreadsGenerate(copied, MethodType(type(copied).generate, copied), copy.deepcopy(self._few, memo))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """What stands in an injected model cannot be written to a file."""
        raise ModelError("an injected model cannot be pickled: call model.hybrimoe.restore() first")


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
