"""Which torch device a name stands for, how much memory it has, and what torch's own libraries take of it."""

from __future__ import annotations

import os
import re

import torch

KIB, MIB = 1 << 10, 1 << 20
WORKSPACE_BYTES = 2 * 4096 * KIB + 8 * 16 * KIB
"""What torch gives cuBLAS on each stream that multiplies, before Hopper (":4096:2:16:8" in its own setting)."""
LARGE_WORKSPACE_BYTES = 32 * MIB
"""The same from Hopper on, and on AMD's cards."""
HOPPER = 9
"""Major compute capability."""
LARGEST_AMD_WORKSPACE_BYTES, LT_WORKSPACE_BYTES = 128 * MIB, 76 * MIB
"""hipBLAS's on the cards of MANY_MATRIX_UNITS, and hipBLASLt's own on each of AMD's."""
MANY_MATRIX_UNITS = ("gfx94", "gfx95")
WORKSPACE_SETTINGS = ("CUBLAS_WORKSPACE_CONFIG", "HIPBLAS_WORKSPACE_CONFIG", "ROCBLAS_WORKSPACE_CONFIG")


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


def blas_workspace_bytes(device: torch.device) -> int:
    """What torch takes of a device for its library of matrix products, once for each stream on which a thread
    multiplies; 0 where torch takes nothing by itself (the host, XPU). The sizes are those of torch's
    `CublasHandlePool.cpp`; for cards after Hopper those of its latest versions, earlier ones take less."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        return _asked_for(WORKSPACE_SETTINGS[:1]) or workspace_of(properties.major)
    many = str(getattr(properties, "gcnArchName", "")).startswith(MANY_MATRIX_UNITS)
    default = LARGEST_AMD_WORKSPACE_BYTES if many else LARGE_WORKSPACE_BYTES
    return (_asked_for(WORKSPACE_SETTINGS) or default) + LT_WORKSPACE_BYTES


def workspace_of(major: int | None) -> int:
    """cuBLAS's on a card of such a major compute capability, where nothing else is asked for; None: the largest."""
    return WORKSPACE_BYTES if major is not None and major < HOPPER else LARGE_WORKSPACE_BYTES


def _asked_for(names: tuple[str, ...]) -> int:
    """Bytes that the first of some variables which is set asks for, as torch reads it; 0 where it says nothing."""
    value = next((os.environ[name] for name in names if name in os.environ), "")
    return sum(int(size) * KIB * int(count) for size, count in re.findall(r":(\d+):(\d+)", value))
