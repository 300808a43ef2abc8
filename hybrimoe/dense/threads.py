"""How many threads torch's operators use in decode steps: one, where they have little to do.

Experts, packed linear layers and decode attention run on the team of `cpu_kernels`. What torch computes between them is
a few microseconds an operator then, for which its own pool gains nothing; and the pool's threads spin after each
operator, on cores that the team or another program needs. The same holds between the steps of `model.generate`, where
the next token is chosen: there the spinning threads took 18 to 28 % of the next step (OLMoE shape, 8 layers, int4, 2
cores). Prompts keep torch's number of threads.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from functools import update_wrapper
from threading import get_ident
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import nn

from cpu_kernels.host.threads import torch_threads
from hybrimoe.dense.calls import MAX_TOKENS, AroundCalls
from hybrimoe.errors import ModelError
from hybrimoe.experts.towers import in_tower, tower_paths

LITTLE_BYTES = 16 << 20
"""Of weights that torch's own linear layers on the CPU read in a step: about 1 ms for one thread."""


class FewThreads:
    """Lets torch run on one thread in the model's calls of few tokens, and between the calls of its `generate`, if its
    linear layers are small."""

    def __init__(self, model: nn.Module) -> None:
        self.applies = torch_linear_bytes(model) <= LITTLE_BYTES
        self.prompt_threads: dict[int, int] = {}
        """By thread that is inside `generate`: torch's number of threads outside, which prompts get."""
        self._model = model
        self._calls: AroundCalls | None = None
        self._generate: FewThreadsGenerate | None = None
        if self.applies:
            self._calls = AroundCalls(model, self._threads_for)
            if hasattr(model, "generate") and "generate" not in model.__dict__:
                self._generate = model.__dict__["generate"] = FewThreadsGenerate(model, model.generate, self)

    def undo(self) -> None:
        """Takes the hooks out of the model, and gives it its `generate` back where nobody else has put another."""
        if self._calls is not None:
            self._calls.undo()
        if self._generate is not None and self._model.__dict__.get("generate") is self._generate:
            del self._model.__dict__["generate"]

    def _threads_for(self, n_tokens: int) -> AbstractContextManager[None]:
        """torch's threads in a call of so many tokens."""
        if 0 < n_tokens <= MAX_TOKENS:
            return torch_threads(1)
        return torch_threads(self.prompt_threads.get(get_ident()) or torch.get_num_threads())


class FewThreadsGenerate:
    """Stands as `generate` on a model: its own, on one thread of torch but for prompts."""

    def __init__(self, model: nn.Module, own: Any, few: FewThreads) -> None:
        self._model = model
        self._own = own
        self._few = few
        update_wrapper(self, own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outside, thread = self._few.prompt_threads, get_ident()
        if thread in outside:  # `generate` inside `generate`
            return self._own(*args, **kwargs)
        outside[thread] = torch.get_num_threads()
        try:
            with torch_threads(1):
                return self._own(*args, **kwargs)
        finally:
            del outside[thread]

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
    """Bytes of the weights of `nn.Linear` layers that are on the CPU, and that text goes through."""
    towers = tower_paths(model)
    named = ((path, module) for path, module in model.named_modules() if type(module) is nn.Linear)
    layers = (module for path, module in named if not in_tower(path, towers))
    return sum(layer.weight.nbytes for layer in layers if layer.weight.device.type == "cpu")
