"""Prompts of bfloat16 models on CPUs whose instructions know no bfloat16: torch's products run in float32.

Without such instructions torch multiplies bfloat16 matrices several times slower than float32 ones. Of many rows at a
time the conversion of a weight costs little beside its product, so linear layers and attention convert what they read
for the call; nothing stays in memory. The result is rounded to bfloat16 once, at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from cpu_kernels.host.isa import cpu_features
from hybrimoe.dense.calls import MAX_TOKENS, AroundCalls

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
        self._calls = AroundCalls(model, _products_for) if self.applies else None

    def undo(self) -> None:
        """Takes the hooks out of the model."""
        if self._calls is not None:
            self._calls.undo()


def _products_for(n_tokens: int) -> AbstractContextManager[Any]:
    return WideProducts() if n_tokens > MAX_TOKENS else nullcontext()
