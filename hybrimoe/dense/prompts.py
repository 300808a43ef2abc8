"""Prompts of bfloat16 models on CPUs whose instructions know no bfloat16: torch's products run in float32.

Without such instructions torch multiplies bfloat16 matrices several times slower than float32 ones. Of many rows at a
time the conversion of a weight costs little beside its product, so linear layers and attention convert what they read
for the call; nothing stays in memory. The result is rounded to bfloat16 once, at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from cpu_kernels.host.isa import cpu_features
from hybrimoe.dense.threads import MAX_TOKENS, n_tokens_of

BFLOAT16_FEATURES = frozenset({"avx512bw", "avxneconvert", "amx-bf16", "bf16"})
"""Names by LLVM of what a CPU has where torch's library multiplies bfloat16 by itself."""


def multiplies_bfloat16() -> bool:
    """Whether torch has fast bfloat16 products on this CPU."""
    return bool(BFLOAT16_FEATURES & cpu_features())


class WideProducts(TorchFunctionMode):
    """While it is entered, bfloat16 linear layers and attention on the CPU compute in float32, where no gradient is
    wanted and there are more than MAX_TOKENS rows."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """torch's call of each of its functions."""
        named = kwargs or {}
        if func in (linear, scaled_dot_product_attention) and _is_narrow(args, named):
            wide = {name: _widened(value) for name, value in named.items()}
            return func(*map(_widened, args), **wide).to(torch.bfloat16)
        return func(*args, **named)


def _is_narrow(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if not tensors or any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    first = tensors[0]
    return first.dtype == torch.bfloat16 and first.shape[:-1].numel() > MAX_TOKENS


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


class WidePrompts:
    """Enters `WideProducts` in the model's calls of many tokens, where the CPU needs that."""

    def __init__(self, model: nn.Module) -> None:
        self.applies = not multiplies_bfloat16() and any(
            parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu" for parameter in model.parameters()
        )
        self._entered: dict[int, list[ExitStack]] = {}
        """By thread: what was entered in each of the calls that it is in."""
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
        entered = ExitStack()
        if n_tokens_of(args, kwargs) > MAX_TOKENS and not torch.compiler.is_compiling():
            entered.enter_context(WideProducts())
        self._entered.setdefault(get_ident(), []).append(entered)

    def _leave(self, *_: object) -> None:
        calls = self._entered[get_ident()]
        calls.pop().close()
        if not calls:
            del self._entered[get_ident()]
