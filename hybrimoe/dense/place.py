"""Dense weights on the accelerator: attention, routers and shared experts run there unless the rules say otherwise."""

from __future__ import annotations

import torch
from torch import nn

from gpu_kernels.devices import auto_device, device_is_here, indexed
from hybrimoe.config.deploy import DeployConfig
from hybrimoe.config.runtime import choose_accelerators


def place_dense(model: nn.Module, deployment: DeployConfig) -> None:
    """Moves every weight and buffer that is loaded to the deployment's accelerator, of several the first.

    Does nothing without a real accelerator, or where rules have placed something already. What is still on the meta
    device stays there; tied weights stay tied.
    """
    device = dense_device(deployment)
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta]
    if device is None or any(tensor.device.type != "cpu" for tensor in tensors):
        return
    move(model, device)


def dense_device(deployment: DeployConfig) -> torch.device | None:
    """The torch device of the deployment's (first) accelerator; None for the emulated one, none, or one that is not
    here (which the session refuses when it opens it)."""
    name = choose_accelerators(deployment.accelerator)[0]
    if name in ("none", "emulated"):
        return None
    if name != "auto":
        device = torch.device(name)
        return indexed(device) if device_is_here(device) else None
    return auto_device()


def move(model: nn.Module, device: torch.device) -> None:
    """Puts all parameters and buffers that have storage on `device`, each once."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.is_meta:
                    continue
                if id(tensor) not in moved:
                    moved[id(tensor)] = _on(tensor, device)
                tensors[name] = moved[id(tensor)]  # type: ignore[assignment]


def _on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device == device:
        return tensor
    copy = tensor.detach().to(device)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
