"""From a device name to an accelerator."""

from __future__ import annotations

import torch

from cpu_kernels import get_backend
from gpu_kernels.accelerator import Accelerator
from gpu_kernels.devices import auto_device, device_is_here, indexed
from gpu_kernels.emulated import EmulatedAccelerator
from gpu_kernels.errors import DeviceNotFoundError
from gpu_kernels.pacing import Pacing
from gpu_kernels.torch_accelerator import TorchAccelerator


def open_accelerator(name: str = "auto", *, backend: str = "auto", pacing: Pacing | None = None) -> Accelerator | None:
    """Opens "emulated", a torch device such as "cuda:0", torch's current device ("auto"), or nothing ("none").

    "auto" gives None on a machine without a torch.accelerator device: an emulation saves no time, so it must be asked
    for. `backend` and `pacing` belong to the emulation: the CPU kernels that compute, and rates to slow down to.
    Raises DeviceNotFoundError for what does not exist here.
    """
    if name == "none":
        return None
    if name == "emulated":
        return EmulatedAccelerator(get_backend(backend, 1), pacing)
    if name == "auto":
        found = auto_device()
        return None if found is None else TorchAccelerator(found)
    return TorchAccelerator(existing_device(name))


def existing_device(name: str) -> torch.device:
    """The torch device of an accelerator on this machine, with its index. Raises DeviceNotFoundError for any other."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceNotFoundError(f"{name!r} is no device; expected none, emulated, auto or e.g. cuda:0") from error
    here = auto_device()
    if device.type == "cpu" or not device_is_here(device):
        count = torch.accelerator.device_count() if here is not None else 0
        there = "torch finds no accelerator" if here is None else f"torch finds {count} x {here.type}"
        raise DeviceNotFoundError(
            f"{name!r} does not exist on this machine: {there}. Use none (experts on the CPU) or emulated (for tests)"
        )
    return indexed(device)
