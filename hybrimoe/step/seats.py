"""The place of a module whose call something else answers: what it is given, and the form of what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.trace import Call


@dataclass(frozen=True, slots=True)
class Seat:
    """A module that a piece stands for: which argument it reads, and the form of what it returns.

    argument: position or name. n_outputs: of a tuple whose others are None; 0: a tensor. flat: rows without a batch.
    """

    path: str
    module: nn.Module
    argument: int | str
    n_outputs: int
    flat: bool

    @classmethod
    def of(cls, call: Call) -> Seat:
        """The seat of a recorded call. Raises NotCompiled where it returns more than its result."""
        found = call.input
        named: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        argument = next(name for name, value in named if value is found)
        many = isinstance(call.output, tuple)
        others = [value for value in call.output if value is not call.result] if many else []
        if any(value is not None for value in others) or not isinstance(call.output, tuple | torch.Tensor):
            raise NotCompiled(f"{call.path}: it returns more than its result")
        flat = call.result.shape == found.reshape(-1, found.shape[-1]).shape
        if not flat and call.result.shape != found.shape:
            raise NotCompiled(f"{call.path}: its result has another shape than its input")
        return cls(call.path, call.module, argument, len(call.output) if many else 0, flat)

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The hidden states of a call."""
        tensor: torch.Tensor = args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]
        return tensor

    def output(self, hidden: torch.Tensor, result: torch.Tensor) -> Any:
        """What the module returns for a result."""
        shaped = result.reshape(-1, hidden.shape[-1]) if self.flat else result.reshape(hidden.shape)
        return (shaped, *[None] * (self.n_outputs - 1)) if self.n_outputs else shaped
