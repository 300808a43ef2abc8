"""What of a session's layers one device computes by itself, or with the host in recorded steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrimoe.runtime.exchanged import ExchangedExperts, find_exchanged
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.stats import StatsRecorder
from hybrimoe.runtime.resident import ResidentExperts, find_resident
from hybrimoe.runtime.staged import StagedPrompts, find_staged
from hybrimoe.runtime.startup.units import Unit


class OnDevice:
    """Each way is the same object as long as the runner is, and what it found of it. staged: what streams prompts, once
    it was asked for."""

    def __init__(self, stats: StatsRecorder) -> None:
        self._stats = stats
        self._resident: ResidentExperts | None = None
        self._exchanged: ExchangedExperts | None = None
        self.staged: StagedPrompts | None = None
        self._staged_of: ExpertsCall | None = None

    def resident(self, runner: ExpertsCall, units: Sequence[Unit]) -> ResidentExperts | None:
        """As `find_resident`."""
        if self._resident is None or self._resident.runner is not runner:
            self._count_resident()
            self._resident = find_resident(runner, units)
        return self._resident

    def streams(self, runner: ExpertsCall, units: Sequence[Unit]) -> StagedPrompts | None:
        """As `find_staged`."""
        if self._staged_of is not runner:
            self._staged_of, self.staged = runner, find_staged(runner, units)
        return self.staged

    def exchanged(self, runner: ExpertsCall, units: Sequence[Unit]) -> ExchangedExperts | None:
        """As `find_exchanged`."""
        if self._exchanged is None or self._exchanged.runner is not runner:
            self._exchanged = find_exchanged(runner, units)
        return self._exchanged

    def prompt(
        self, runner: ExpertsCall, units: Sequence[Unit], layer: int, hidden: torch.Tensor, ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor | None:  # fmt: skip
        """A call of several tokens, as HybridExperts.forward, by the device; None where the usual way runs it."""
        if runner.lossy is None and (resident := self.resident(runner, units)) is not None:
            output = resident.run_prompt(layer, hidden, ids, weights)
            if output is not None:
                return output
        staged = self.streams(runner, units)
        return None if staged is None else staged.run(layer, hidden, ids, weights)

    def report(self) -> None:
        """Counts the calls that the device has computed."""
        self._count_resident()
        self.tell()

    def tell(self) -> None:
        """Tells the planner of the calls that it has not planned, before it plans the next one."""
        if self.staged is not None and self.staged.untold:
            self.staged.report(self._stats)

    def _count_resident(self) -> None:
        if self._resident is not None:
            self._resident.report(self._stats)
