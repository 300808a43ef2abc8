"""Which torch device a name stands for, and how much memory it has. The one home for both."""

from __future__ import annotations

import torch


def auto_device() -> torch.device | None:
    """The accelerator that "auto" means: torch's current one, with its index; None where torch finds none."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None else indexed(found)


def indexed(device: torch.device | str) -> torch.device:
    """The device with an index: without one, "cuda" means torch's current device, as everywhere in torch."""
    device = torch.device(device)
    if device.type == "cpu" or str(device) != device.type:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def device_is_here(device: torch.device) -> bool:
    """True for the CPU and for accelerators that torch finds on this machine."""
    if device.type == "cpu":
        return True
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return here is not None and here.type == device.type and (device.index or 0) < torch.accelerator.device_count()


def memory_info(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of an accelerator.

    `torch.accelerator` tells them from torch 2.10 on; before, only the device's own module does.
    """
    ask = getattr(torch.accelerator, "get_memory_info", None) or torch.get_device_module(device).mem_get_info
    free, total = ask(device)
    return int(free), int(total)
