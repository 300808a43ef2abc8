"""What a lossy policy is to a layer call: a stage between router and planner, and what the call tells and asks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from hybrimoe.runtime.layer_call.experts import Experts
from hybrimoe.runtime.layer_call.lookahead import Lookahead
from hybrimoe.runtime.layer_call.routing import CallInputs, CallSpace
from hybrimoe.runtime.layer_call.steps import Step
from scheduler import Phase
from scheduler.lossy import LossyPolicy


class HostBytes(Protocol):
    """Something beside the store that takes host memory."""

    @property
    def nbytes(self) -> int: ...


class LossyStage(Protocol):
    """What rewrites the routing of a call, see `hybrimoe.runtime.lossy.stage`, and what the call tells and asks it."""

    @property
    def policy(self) -> LossyPolicy: ...

    @property
    def low(self) -> Experts | None: ...

    @property
    def gates(self) -> Lookahead | None: ...

    @property
    def planes(self) -> HostBytes | None: ...

    @property
    def router_weights(self) -> npt.NDArray[np.float32]: ...

    def begin_step(self, step: Step) -> None: ...

    def rewrite(self, phase: Phase, index: int, inputs: CallInputs) -> Sequence[CallSpace]: ...

    def lanes(self, space: CallSpace, parts: Sequence[CallSpace]) -> tuple[float, float, float]: ...

    def before_compute(self, index: int, phase: Phase) -> None: ...

    def after_compute(self, index: int, phase: Phase) -> None: ...

    def joined(self, index: int, phase: Phase, outputs: list[torch.Tensor]) -> torch.Tensor: ...

    def take_over(self, previous: LossyStage, lookahead: Lookahead | None) -> None: ...

    def close(self) -> None: ...
