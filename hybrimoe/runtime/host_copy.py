"""`memory.host_copy: drop`: experts that stay in their slots for good have no copy in host memory.

That is for policies that never move an expert. Once the slots are filled, the pages of their experts' records go back
to the system. Whoever needs them afterwards (a resize, another policy, a failed call, `restore`) has them read back
from the slots first; records of a mapped packed file come from the file again by themselves.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

from gpu_kernels import Accelerator
from gpu_kernels.page_locked import unlock
from hybrimoe.errors import ConfigError
from hybrimoe.runtime.config import RuntimeConfig
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.store import ExpertStore
from scheduler.planner.policies import Policy, resolve_policy

KEEP = "keep the host copies (memory.host_copy: keep)"


def never_moves(policy: str | Policy) -> bool:
    """Whether a policy leaves each expert where the start has put it, and computes what is in a slot there."""
    found = resolve_policy(policy)
    return found.balance == "static" and found.prefetch == "none" and found.streaming is None


def require_droppable(config: RuntimeConfig, accelerators: Sequence[Accelerator]) -> None:
    """Raises ConfigError where host copies cannot be given up as the settings stand."""
    what = "memory.host_copy: drop"
    if not accelerators:
        raise ConfigError(f"{what} needs an accelerator whose slots hold experts, and there is none: {KEEP}")
    if not never_moves(config.policy):
        raise ConfigError(
            f"{what} is for policies that never move an expert, as static does, not {config.policy!r}: {KEEP}, or take"
            " scheduler.policy: static"
        )
    if config.lossy is not None:
        raise ConfigError(f"{what} and scheduler.lossy ({config.lossy}) do not go together: {KEEP}")
    if not hasattr(mmap, "MADV_DONTNEED"):
        raise ConfigError(f"{what} needs a system that takes single pages of memory back (Linux): {KEEP}")


def drop(store: ExpertStore, runner: ExpertsCall) -> None:
    """Waits until the slots are filled, and gives up the host copies of what they hold.

    Raises ConfigError where the store cannot, LaneError where a slot could not be filled.
    """
    if not store.in_memory:
        raise ConfigError(
            "memory.host_copy: drop is for experts that are all in host memory, and with memory.disk they are read when"
            f" they are needed: {KEEP}"
        )
    runner.drain()
    held = list(runner.slot_contents().values())
    if not held:
        return
    if store.is_own:
        unlock(store.buffer)  # nothing is copied from there any more
        if torch.from_numpy(store.buffer[:1]).is_pinned():
            raise ConfigError(
                f"memory.host_copy: drop cannot give up memory that torch has page-locked for this device: {KEEP}"
            )
    store.released_bytes = 0
    for layer, expert in held:
        store.release(layer, expert)


def bring_back(store: ExpertStore, runner: ExpertsCall) -> None:
    """Reads every host copy that was given up back from its slot. Raises LostError where the accelerator is lost."""
    for layer, expert in store.released():
        n_bytes = store.layers[layer].spec.record_bytes
        store.refill(layer, expert, runner.experts.lanes.read_back(layer, expert, n_bytes))
