"""Experts in accelerator slots: the accelerator protocol, its emulation on the host, and torch devices."""

from gpu_kernels.accelerator import Accelerator, Event, LayerWork
from gpu_kernels.emulated import EmulatedAccelerator
from gpu_kernels.errors import AcceleratorError, ClosedError, DeviceNotFoundError, LaneError, LostError, SlotError
from gpu_kernels.opening import open_accelerator
from gpu_kernels.pacing import Pacing
from gpu_kernels.torch_accelerator import TorchAccelerator

__all__ = [
    "Accelerator",
    "AcceleratorError",
    "ClosedError",
    "DeviceNotFoundError",
    "EmulatedAccelerator",
    "Event",
    "LaneError",
    "LayerWork",
    "LostError",
    "Pacing",
    "SlotError",
    "TorchAccelerator",
    "open_accelerator",
]
