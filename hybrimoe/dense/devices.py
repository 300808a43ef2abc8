"""Modules on other devices: weights are moved, calls are wrapped so that tensors follow, and it can be undone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gpu_kernels.devices import device_is_here
from hybrimoe.errors import DeviceError


def require_device(device: torch.device, where: str) -> None:
    """Raises DeviceError, naming `where`, for a device that is not on this machine."""
    if device_is_here(device):
        return
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    current = torch.accelerator.current_accelerator() if count else None
    found = f"torch finds {count} of type {current.type}" if current is not None else "torch finds no accelerator"
    raise DeviceError(
        f"{where}: the device {str(device)!r} is not here: {found}; use cpu, or `missing: stay` in the rule"
    )


class Placements:
    """The modules that were put on a device, in the order of the model (outer ones first)."""

    def __init__(self) -> None:
        self.devices: dict[str, torch.device] = {}
        self._undo: list[Callable[[], None]] = []

    def place(self, path: str, module: nn.Module, device: torch.device, claimed: frozenset[int]) -> None:
        """Put a module on a device, except what is inside it and has a rule of its own (`claimed`: ids of modules).

        Weights on the meta device stay there: who loads them asks `device_of`.
        """
        for part in _unclaimed(module, claimed):
            self._move(part, part._parameters, device)
            self._move(part, part._buffers, device)
        around = self.device_of(path.rpartition(".")[0])
        self.devices[path] = device
        if around != device and self._crosses(module, device):
            self._wrap(module, device)

    def device_of(self, path: str) -> torch.device | None:
        """Device of the module at `path`, as the innermost placed module around it says; None where none does."""
        while path:
            if path in self.devices:
                return self.devices[path]
            path = path.rpartition(".")[0]
        return None

    def undo(self) -> None:
        """Put the same parameter and buffer objects back and unwrap the calls. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self.devices.clear()

    def _move(self, module: nn.Module, tensors: dict[str, Any], device: torch.device) -> None:
        for name, tensor in tensors.items():
            if tensor is None or tensor.is_meta or tensor.device == device:
                continue
            moved = tensor.detach().to(device)
            tensors[name] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
            self._undo.append(functools.partial(tensors.__setitem__, name, tensor))

    @staticmethod
    def _crosses(module: nn.Module, device: torch.device) -> bool:
        """False where everything is on the CPU: then no tensor ever has to follow."""
        return device.type != "cpu" or torch.accelerator.is_available()

    def _wrap(self, module: nn.Module, device: torch.device) -> None:
        before = module.__dict__.get("forward")
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            home = next(_tensors((args, kwargs)), torch.empty(0)).device
            return to_device(inner(*to_device(args, device), **to_device(kwargs, device)), home)

        module.__dict__["forward"] = forward

        def unwrap() -> None:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before

        self._undo.append(unwrap)


def to_device(value: Any, device: torch.device) -> Any:
    """A value with every tensor in its tuples, lists and mappings on `device`; other objects stay as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    if type(value) is dict:
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif type(value) is dict:
        yield from _tensors(list(value.values()))


def _unclaimed(module: nn.Module, claimed: frozenset[int]) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if id(child) not in claimed:
            yield from _unclaimed(child, claimed)
