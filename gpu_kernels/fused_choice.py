"""Whether the fused Triton kernels run here: installed, knowing the spec, and right on their first use.

They are compiled for the device at hand when they are first called, once for each spec and number of tokens that a
program takes. So the first group of each is computed by torch too and compared: kernels that do not compile or do not
agree are reported once and not used for it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from cpu_kernels import ExpertSpec, relative_error, tolerance
from gpu_kernels.tuning import Timings, TunedModule, setting_of, timer, tune
from gpu_kernels.waiting import wait_for_stream

AGREEMENT = 1e-4
"""Relative error allowed between the fused kernels and torch where both add in float32, in another order; tensor cores,
which cut digits off within a sum, were seen to differ by 1.2e-5 (H200, 16 tokens of bfloat16 experts)."""


Prepared = dict[ExpertSpec, torch.Tensor]
"""A call's hidden states as the kernels for a kind of experts read them."""


def agreement(spec: ExpertSpec) -> float:
    """Allowed ``max |y - reference| / max |reference|`` of the fused kernels.

    int8 and int4 experts meet activations rounded to int8, as on the CPU: `cpu_kernels.tolerance` says what that costs.
    """
    return max(AGREEMENT, tolerance(spec))


@dataclass(frozen=True, slots=True)
class Group:
    """Experts of one call as device tensors; see `gpu_kernels.triton.fused.run_group`. A part of a group
    has the whole one's `rows`, of which its own begin at `first_row`, and shares what is `prepared` for all parts."""

    slot_ids: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor
    n_tokens: list[int]
    hidden: torch.Tensor
    weights: torch.Tensor
    top_k: int
    out: torch.Tensor
    prepared: Prepared | None = None
    first_row: int = 0
    most: int | None = None
    """Rows that an expert may have where the host does not know them: `n_tokens` are then those to be expected."""

    @property
    def own_rows(self) -> torch.Tensor:
        """Those of `rows` that are the group's."""
        return self.rows[self.first_row : self.first_row + sum(self.n_tokens)]

    def part(self, begin: int, n_experts: int) -> Group:
        """Some of the experts, from `begin` on."""
        end = begin + n_experts
        return replace(
            self, slot_ids=self.slot_ids[begin:end], offsets=self.offsets[begin : end + 1],
            n_tokens=self.n_tokens[begin:end], first_row=self.first_row + sum(self.n_tokens[:begin]),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowsOfCall:
    """The rows of one call as device tensors; see `gpu_kernels.triton.combine.combine`."""

    rows: torch.Tensor
    host_rows: torch.Tensor | None
    source: torch.Tensor | None
    top_k: int
    dtype: torch.dtype


class FusedModule(TunedModule, Protocol):
    """What this module needs of `gpu_kernels.triton.fused`."""

    MAX_TOKENS: int
    """Of one expert."""

    def supports(self, spec: ExpertSpec) -> bool:
        """Whether the kernels know the spec's activation."""
        ...

    def block_tokens(self, n_tokens: list[int]) -> int:
        """Tokens that one program takes of a group whose experts have so many: what the kernels are compiled for."""
        ...


AddsUp = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, torch.dtype], torch.Tensor]
"""`gpu_kernels.triton.combine.combine`."""


def load_fused() -> FusedChoice | None:
    """The fused kernels, or None where Triton is not installed, or not in working order (which is told)."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from gpu_kernels.triton import combine, fused
    except Exception as error:  # noqa: BLE001 - a broken installation: its errors have no common root
        warnings.warn(
            f"Triton is installed but cannot be loaded ({type(error).__name__}: {error}): experts on the accelerator"
            " run on torch's own kernels, slower. Install triton again in the version that torch asks for",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return FusedChoice(fused, combine.combine)


class FusedChoice:
    """Runs groups by the fused kernels, and adds up rows, where these were found right. `add_up` None: always by
    torch. It belongs to one accelerator: what it launches on a device comes one after the other."""

    def __init__(self, module: FusedModule, add_up: AddsUp | None = None) -> None:
        self.module = module
        self._add_up = add_up
        self._right: dict[tuple[ExpertSpec, int], bool] = {}
        self._adds_up: dict[tuple[int, int, torch.dtype, bool], bool] = {}
        self._cuts: dict[tuple[ExpertSpec, int], Any] = {}
        self._states: dict[torch.device, torch.Tensor] = {}

    def tune(self, spec: ExpertSpec, slots: torch.Tensor, seconds: float) -> bool:
        """Takes the cuts that are the fastest on the slots' device, by what was timed there before, and by timing the
        others for so many seconds at most. For the start of a session: another cut adds up in another order. True where
        a kernel has another cut than before, and was not compared with torch's yet."""
        time_us = timer(self.module, spec, slots) if self.module.supports(spec) else None
        if time_us is None:
            return False
        chosen = tune(self.module, spec, slots.device, Timings.of(setting_of(slots.device)), time_us, seconds)
        changed = {(spec, block): cuts for block, cuts in chosen.items() if self._cuts.get((spec, block)) != cuts}
        for (_, block), cuts in changed.items():
            self.take(spec, block, cuts, slots.device)
        return bool(changed)

    def take(self, spec: ExpertSpec, block: int, cuts: Any, device: torch.device) -> None:
        """Uses that cut for programs of `block` tokens from now on, which is compared with torch's on its next `run`.
        Not while work is recorded."""
        if cuts.single and device not in self._states:
            self._states[device] = self.module.new_state(device)
            wait_for_stream(device, "counters of kernels of one launch")
        self._cuts[spec, block] = cuts
        self._right.pop((spec, block), None)

    def cuts(self, spec: ExpertSpec, n_tokens: list[int]) -> Any | None:
        """The cut that was chosen for such a group; None: the default."""
        return self._cuts.get((spec, self.module.block_tokens(n_tokens)))

    def accepts(self, spec: ExpertSpec, n_tokens: list[int]) -> bool:
        """Whether `run` may be called: known activation, not found wrong before."""
        few = max(n_tokens) <= self.module.MAX_TOKENS
        if not few or not self.module.supports(spec):
            return False
        return self._right.get((spec, self.module.block_tokens(n_tokens)), True)

    def is_right(self, spec: ExpertSpec, n_tokens: int) -> bool:
        """Whether the kernel for so many tokens of an expert was used before, and found right."""
        return self._right.get((spec, self.module.block_tokens([n_tokens])), False)

    def run_known(self, spec: ExpertSpec, slots: torch.Tensor, group: Group) -> None:
        """Computes the group's rows by a kernel that was found right (`is_right`)."""
        self._launch(spec, slots, group)

    def run(self, spec: ExpertSpec, slots: torch.Tensor, group: Group, by_torch: Callable[[], None]) -> None:
        """Computes the group's rows; on the first use of a kernel also by `by_torch`, whose rows then stand."""
        kernel = spec, self.module.block_tokens(group.n_tokens)
        problem = self._try(spec, slots, group)
        if problem is None and self._right.get(kernel):
            return
        rows = group.out[group.own_rows].clone()
        by_torch()
        expected = group.out[group.own_rows]
        wait_for_stream(group.out.device, "the first run of a kernel")
        if problem is None and not torch.isfinite(expected).all():
            return  # nothing to compare with: the next group tells
        if problem is None and not relative_error(rows, expected) <= agreement(spec):
            problem = "results differ from torch's"
        self._right[kernel] = problem is None
        if problem is not None:
            what = f"{spec.dtype} experts [{spec.hidden}, {spec.inter}], {kernel[1]} tokens at once"
            warnings.warn(
                f"the fused Triton kernels are not used for {what}: {problem}",
                RuntimeWarning,
                stacklevel=2,
            )

    def combine(self, given: RowsOfCall, by_torch: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The call's output; on the first use of a kernel that of `by_torch`, which it must give bit for bit."""
        kernel = given.rows.shape[1], given.top_k, given.dtype, given.source is not None
        right, add_up = self._adds_up.get(kernel), self._add_up
        if add_up is None or right is False:
            return by_torch()
        try:
            found = add_up(given.rows, given.host_rows, given.source, given.top_k, given.dtype)
            problem = None
        except Exception as error:  # noqa: BLE001 - as in `_try`
            found, problem = given.rows, f"{type(error).__name__}: {error}"
        if problem is None and right:
            return found
        expected = by_torch()
        wait_for_stream(expected.device, "the first run of a kernel")
        if problem is None and not torch.isfinite(expected).all():
            return expected  # nothing to compare with: the next call tells
        if problem is None and not torch.equal(found, expected):
            problem = "results differ from torch's"
        self._adds_up[kernel] = problem is None
        if problem is not None:
            what = f"{given.top_k} rows a token of {kernel[0]} columns, {given.dtype}"
            warnings.warn(
                f"the Triton kernel that adds up rows is not used for {what}: {problem}", RuntimeWarning, stacklevel=2
            )
        return expected

    def _try(self, spec: ExpertSpec, slots: torch.Tensor, group: Group) -> str | None:
        try:
            self._launch(spec, slots, group)
        except Exception as error:  # noqa: BLE001 - a compiler of another project: its errors have no common root
            return f"{type(error).__name__}: {error}"
        return None

    def _launch(self, spec: ExpertSpec, slots: torch.Tensor, group: Group) -> None:
        cuts = self.cuts(spec, group.n_tokens)
        more: dict[str, Any] = {} if cuts is None else {"cuts": cuts}
        if group.prepared is not None:
            more["prepared"] = group.prepared
        if cuts is not None and cuts.single:
            more["state"] = self._states[group.out.device]
        if group.most is not None:
            more["most"] = group.most
        self.module.run_group(
            spec, slots, group.slot_ids, group.offsets, group.rows, group.n_tokens, group.hidden, group.weights,
            group.top_k, group.out, **more,
        )  # fmt: skip
