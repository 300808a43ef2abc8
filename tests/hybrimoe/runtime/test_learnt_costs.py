"""What a session learns of its accelerator's time: an expert's own, apart from what launching a group takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybrimoe.experts import layout as experts_layout
from hybrimoe.runtime.layer_call.experts import Experts
from hybrimoe.runtime.layer_call.layers import Layer
from hybrimoe.runtime.layer_call.routing import CallSpace, Workspace
from hybrimoe.runtime.layer_call.stats import Counters, StatsRecorder
from hybrimoe.runtime.store import ExpertStore
from scheduler import CostModel, Planner
from scheduler.machine.costs import LAUNCH_EXPERTS

from .conftest import MiniExperts

HIDDEN, N_EXPERTS, OWN_US = 24, 8, 20.0


class Lane:
    """A piece of work that took so long on a synthetic accelerator."""

    def __init__(self, us: float) -> None:
        self._us = us

    @property
    def ended(self) -> bool:
        return True

    def wait(self) -> None: ...

    @property
    def span_us(self) -> tuple[float, float]:
        return 1000.0, 1000.0 + self._us


def experts_of_a_layer() -> Experts:
    module = MiniExperts(N_EXPERTS, 0, HIDDEN, 8)
    layer = Layer("experts", experts_layout.read(module).spec("float32"), N_EXPERTS, "hybrid", None, module)
    planner = Planner(1, N_EXPERTS, N_EXPERTS, CostModel.uniform(1, 100.0, OWN_US, 50.0), "static")
    return Experts([layer], ExpertStore([layer.layer_spec]), planner, StatsRecorder(1, layer.num_experts))


def call_on_the_accelerator(experts: Experts, n_active: int, launch_us: float) -> None:
    """A call whose experts all ran on the accelerator, after a launch of so many us."""
    space: CallSpace = experts.spaces[0]
    ids = torch.arange(n_active).view(1, -1)
    space.read(torch.zeros(1, HIDDEN), ids, torch.ones(1, n_active), Workspace())
    space.step, space.counters, space.cpu_us, space.recorded = 0, Counters(), 0.0, True
    space.ends.append(Lane(launch_us + OWN_US * n_active))
    space.sent.append(list(range(n_active)))
    experts.reports.finish(space)
    experts.reports.finished = None  # the planner has no open plan of it
    experts.reports.collect("decode")


@pytest.mark.parametrize("launch_us", [30.0, 400.0])
def test_a_slow_launch_is_no_experts_cost(launch_us: float) -> None:
    experts, random = experts_of_a_layer(), np.random.default_rng(0)
    for _ in range(200):
        call_on_the_accelerator(experts, int(random.integers(1, N_EXPERTS + 1)), launch_us)
    assert experts.costs is not None
    assert float(experts.costs.accel_us(0, 1)) == pytest.approx(OWN_US, rel=0.05)
    assert experts.costs.launch_us(0) == pytest.approx(min(launch_us, LAUNCH_EXPERTS * OWN_US), rel=0.05)
