"""Which of several cuts of the fused kernels is the fastest on a card: timed at a session's start, kept for the next.

A cut says how a kernel's work is shared between programs (`gpu_kernels.triton.cuts`). It changes the order of sums, so
it is chosen once, before a session's first call. What was timed is kept in a file for each card, driver, version of
torch and Triton, and state of the kernels' sources; a file that is missing or damaged is written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from cpu_kernels import ExpertSpec
from cpu_kernels.jit.cache_dir import cache_home
from gpu_kernels.graphs import graphs_of
from scheduler.compiled import source_stamp

FOLDER = "cards"
"""In the folder of all that is kept between starts."""
MARGIN = 0.97
"""A cut is taken instead of the default where it takes at most this share of its time: less is noise."""
EXPERTS = 4
"""At most, of a timed call: between a step whose experts all have slots and one with most of them on the CPU."""
CALLS = 12
"""At most, in one graph, each of other experts: caches are then as cold as in a real step."""


class TunedModule(Protocol):
    """What this module needs of `gpu_kernels.triton.fused`."""

    def blocks(self) -> Sequence[int]:
        """Each number of tokens that one program may take."""
        ...

    def candidates(self, spec: ExpertSpec, block: int, device: torch.device) -> Sequence[Any]:
        """Cuts that may be the fastest for programs of `block` tokens, the default first; each has a `label`,
        and says whether it is `single`, for one launch."""
        ...

    def new_state(self, device: torch.device) -> torch.Tensor:
        """What cuts for one launch need beside a call's own memory, for calls that follow each other."""
        ...

    def run_group(
        self, spec: ExpertSpec, slots: torch.Tensor, slot_ids: torch.Tensor, offsets: torch.Tensor,
        rows: torch.Tensor, n_tokens: list[int], hidden: torch.Tensor, weights: torch.Tensor, top_k: int,
        out: torch.Tensor, *, cuts: Any = None, state: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Computes the group's rows into `out`, by kernels cut as `cuts` says."""
        ...


TimesCuts = Callable[[int, Any], float]
"""us of a call whose experts have `block` tokens each, by the kernels of one of the cuts."""


class Timings:
    """Times in us by kernel and cut, None where a cut does not run; kept in a file."""

    def __init__(self, path: Path, setting: str) -> None:
        self.path, self.setting = path, setting
        self.us: dict[str, dict[str, float | None]] = {}

    @classmethod
    def of(cls, setting: str) -> Timings:
        """What was kept for a setting; nothing where its file is missing or damaged."""
        name = hashlib.sha256(setting.encode()).hexdigest()[:16]
        timings = cls(cache_home() / FOLDER / f"{name}.json", setting)
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            kept = json.loads(timings.path.read_text(encoding="utf-8"))
            if kept["setting"] == setting:
                timings.us = {
                    str(kernel): {str(label): None if us is None else float(us) for label, us in times.items()}
                    for kernel, times in kept["us"].items()
                }
        return timings

    def best(self) -> dict[str, str]:
        """The fastest cut of each kernel."""
        ran = {
            kernel: {label: us for label, us in times.items() if us is not None} for kernel, times in self.us.items()
        }
        return {kernel: min(times, key=times.__getitem__) for kernel, times in ran.items() if times}

    def keep(self) -> None:
        """Writes the file, where one can be written."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".part")
            partial.write_text(json.dumps({"setting": self.setting, "us": self.us}, indent=1), encoding="utf-8")
            partial.replace(self.path)


def setting_of(device: torch.device) -> str:
    """What times depend on: card, driver, versions, and the sources of the kernels."""
    parts = [str(torch.get_device_module(device).get_device_name(device)), _driver()]
    parts += [f"torch {torch.__version__}", f"triton {_triton()}", source_stamp("gpu_kernels/triton")[:16]]
    return "; ".join(parts)


def kernel_name(spec: ExpertSpec, block: int) -> str:
    """How timings call the kernels of a kind of expert for programs of `block` tokens."""
    kind = f"{spec.activation.kind}{'' if spec.activation.gated else ' ungated'}{' bias' if spec.has_bias else ''}"
    return f"{spec.dtype} {spec.hidden}x{spec.inter} {kind}, {block} tokens"


def tune(
    module: TunedModule, spec: ExpertSpec, device: torch.device, timings: Timings, time_us: TimesCuts, seconds: float
) -> dict[int, Any]:
    """The cut to take for each number of tokens that a program takes; none where nothing is known yet.

    Times what `timings` does not know, for so many seconds at most, and keeps it. A cut that does not run is left out.
    """
    until, timed, chosen = time.monotonic() + seconds, False, {}
    for block in module.blocks():
        candidates = module.candidates(spec, block, device)
        times = timings.us.setdefault(kernel_name(spec, block), {})
        for cuts in candidates if len(candidates) > 1 else ():
            if cuts.label in times or time.monotonic() >= until:
                continue
            try:
                times[cuts.label], timed = _time(time_us, block, cuts), True
            except torch.OutOfMemoryError:
                until = 0.0  # nothing can be timed now
        best = fastest(candidates, times)
        if best is not None:
            chosen[block] = best
    if timed:
        timings.keep()
    return chosen


def fastest(candidates: Sequence[Any], times: dict[str, float | None]) -> Any | None:
    """The candidate with the least time; the first, which is the default, where no other is clearly faster. None
    where none was timed."""
    known = [(us, number) for number, cuts in enumerate(candidates) if (us := times.get(cuts.label)) is not None]
    if not known:
        return None
    least_us, number = min(known)
    default_us = times.get(candidates[0].label)
    keeps_default = default_us is not None and least_us > MARGIN * default_us
    return candidates[0 if keeps_default else number]


def _time(time_us: TimesCuts, block: int, cuts: Any) -> float | None:
    try:
        return time_us(block, cuts)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - compilers and drivers of other projects: no common root
        return None


def timer(module: TunedModule, spec: ExpertSpec, slots: torch.Tensor) -> TimesCuts | None:
    """Times calls on the experts in `slots`, whatever these hold; None where a device cannot record graphs, without
    which the host's launches would be what is timed."""
    graphs = graphs_of(slots.device)
    if graphs is None or not len(slots):
        return None
    n_experts = min(EXPERTS, len(slots))
    n_calls = max(1, min(CALLS, len(slots) // n_experts))
    order = torch.arange(n_experts * n_calls, dtype=torch.int32, device=slots.device)

    def time_us(block: int, cuts: Any) -> float:
        n_rows = n_experts * block
        rows = torch.arange(n_rows, device=slots.device).view(block, n_experts).T.reshape(-1).contiguous()
        offsets = torch.arange(n_experts + 1, dtype=torch.int32, device=slots.device) * block
        hidden = torch.randn((block, spec.hidden), device=slots.device)
        weights, out = torch.rand(n_rows, device=slots.device), torch.empty((n_rows, spec.hidden), device=slots.device)
        state = module.new_state(slots.device) if cuts.single else None

        def call(number: int) -> None:
            ids = order[number * n_experts : (number + 1) * n_experts]
            module.run_group(
                spec, slots, ids, offsets, rows, [block] * n_experts, hidden, weights, n_experts, out, cuts=cuts,
                state=state,
            )  # fmt: skip

        call(0)
        with graphs.recording():
            graphs.begin()
            for number in range(n_calls):
                call(number)
            graph = graphs.end()
        return graphs.time_us(graph) / n_calls

    return time_us


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0].strip()
    except OSError:
        return "driver unknown"


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "unknown"
