"""`simulate`: the right simulator for a profile and a configuration, built and run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import Phase
from scheduler.machine.profile import HardwareProfile, ModelShape
from scheduler.setting import Scorer
from scheduler.simulator.accelerators import MultiSimulator
from scheduler.simulator.engine import SimulationError
from scheduler.simulator.simulator import SimulationConfig, Simulator
from scheduler.simulator.stats import PhaseResult
from scheduler.traces.demands import DemandSource
from scheduler.traces.predictions import Predictions
from scheduler.traces.trace import Trace, TraceStep


def simulator_class(profile: HardwareProfile, config: SimulationConfig) -> type[Simulator]:
    """The simulator for several accelerators, or for one. Raises SimulationError for several and a lossy policy."""
    if profile.accel.count == 1:
        return Simulator
    if config.lossy is not None:
        raise SimulationError(f"a lossy policy is simulated with one accelerator only, found {profile.accel.count}")
    return MultiSimulator


def simulate(
    trace: Trace,
    profile: HardwareProfile,
    shape: ModelShape,
    config: SimulationConfig | None = None,
    predictions: Predictions | None = None,
    frequencies: NDArray[np.float64] | None = None,
    phase: Phase | None = None,
    source: DemandSource | None = None,
    scorer: Scorer | None = None,
    prefetch_scorer: Scorer | None = None,
    steps: Sequence[TraceStep] | None = None,
) -> list[PhaseResult]:
    """Build the right :class:`Simulator` and run it."""
    config = SimulationConfig() if config is None else config
    return simulator_class(profile, config)(
        trace, profile, shape, config, predictions, frequencies, phase, False, source, scorer, prefetch_scorer, steps
    ).run()
