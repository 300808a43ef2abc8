"""An accelerator that hangs or has failed: whether the session can go on without it, and what is then kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from gpu_kernels import Accelerator, LostError
from gpu_kernels.waiting import DeviceFailure
from hybrimoe.runtime.config import RuntimeConfig
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.store import ExpertStore

DEVICE_ERRORS = (torch.OutOfMemoryError, LostError, DeviceFailure)
"""What a call raises for the device's sake; all else is the call's own."""
_ABANDONED: list[object] = []
"""What a lost accelerator may still read and write, if it ever goes on: it is never freed, and never used again."""


def lost_of(accelerators: Sequence[Accelerator]) -> str | None:
    """What has become of the first one that hangs or has failed; None as long as all work."""
    return next((device.wait_limit.lost for device in accelerators if device.wait_limit.lost), None)


def as_lost(error: Exception, accelerators: Sequence[Accelerator]) -> LostError:
    """torch's error of a device that has failed, as ours. Raises it as it is where there is no accelerator."""
    if isinstance(error, LostError):
        return error
    if not accelerators:
        raise error
    return accelerators[0].wait_limit.failed(error)


def why_it_ends(config: RuntimeConfig, store: ExpertStore, hidden: torch.Tensor) -> str | None:
    """Why a call with these hidden states cannot be computed by the CPU alone; None where it can."""
    again = "start the program again; with accelerator none (--accelerator none) the CPU computes all"
    if hidden.device.type != "cpu":
        return (
            f"Its memory has this model's other weights and the keys and values of the reply, which are lost: {again}"
        )
    if config.lossy is not None:
        return f"scheduler.lossy has experts there that the host has not: {again}"
    if store.released():
        return f"The host has no copy of the experts in its slots: {again}, or without memory.host_copy: drop"
    return None


def go_on_without(error: LostError, accelerators: Sequence[Accelerator], runner: ExpertsCall) -> None:
    """Says that from here on the CPU computes everything; keeps what belongs to the accelerators as it is."""
    warnings.warn(
        f"{error}. The CPU computes all experts from here on, which is slower; start the program again to use the"
        " accelerator",
        RuntimeWarning,
        stacklevel=4,
    )
    for accelerator in accelerators:
        if accelerator.wait_limit.lost is None:  # another one's: what it has under way is not waited for, either
            accelerator.wait_limit.lost = str(error)
            accelerator.wait_limit.allow(0.0)
    _ABANDONED.append((accelerators, runner))
