"""What a layer asks for: the typed input of ``Planner.plan_layer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from scheduler.errors import DemandError

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Demand expected at a later layer of the same step (the gates of that layer on today's hidden state).

    expert_ids int32[P]; n_tokens float32[P] expected tokens of each; scores float32[P] mean gate probability.
    """

    layer: int
    expert_ids: npt.NDArray[np.int32]
    n_tokens: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]


class Demand(Protocol):
    """What planner and policies read of a layer's demand; the fields are those of ``LayerDemand``.

    It may be a workspace that the layer's next call fills anew: what is to last longer is copied.
    """

    @property
    def layer(self) -> int: ...

    @property
    def phase(self) -> Phase: ...

    @property
    def n_tokens_total(self) -> int: ...

    @property
    def expert_ids(self) -> npt.NDArray[np.int32]: ...

    @property
    def n_tokens(self) -> npt.NDArray[np.int32]: ...

    @property
    def gate_scores(self) -> npt.NDArray[np.float32]: ...

    @property
    def predictions(self) -> tuple[Prediction, ...]: ...


@dataclass(slots=True, eq=False)
class DemandView:
    """A demand whose fields are set anew for each call of a layer, see ``Demand``."""

    layer: int
    phase: Phase
    n_tokens_total: int
    expert_ids: npt.NDArray[np.int32]
    n_tokens: npt.NDArray[np.int32]
    gate_scores: npt.NDArray[np.float32]
    predictions: tuple[Prediction, ...] = ()

    def frozen(self) -> LayerDemand:
        """A copy that lasts."""
        return LayerDemand(
            self.layer, self.phase, self.n_tokens_total, self.expert_ids.copy(), self.n_tokens.copy(),
            self.gate_scores.copy(), copied(self.predictions),
        )  # fmt: skip


def copied(predictions: tuple[Prediction, ...]) -> tuple[Prediction, ...]:
    """Predictions with arrays of their own."""
    return tuple([Prediction(p.layer, p.expert_ids.copy(), p.n_tokens.copy(), p.scores.copy()) for p in predictions])


@dataclass(frozen=True, slots=True, eq=False)
class LayerDemand:
    """Router output of one layer and step, summed over tokens.

    ``layer`` counts MoE layers from 0. expert_ids int32[A] ascending; n_tokens int32[A], each at least 1;
    gate_scores float32[E]: mean over the step's tokens of the gate probability (0 where it is not known).
    ``n_tokens_total`` is the number of tokens in the step.
    """

    layer: int
    phase: Phase
    n_tokens_total: int
    expert_ids: npt.NDArray[np.int32]
    n_tokens: npt.NDArray[np.int32]
    gate_scores: npt.NDArray[np.float32]
    predictions: tuple[Prediction, ...] = ()

    def validate(self, n_layers: int, n_experts: int) -> None:
        """Raises DemandError unless everything above holds. For borders and tests; the hot path checks less."""
        if self.phase not in ("prefill", "decode"):
            raise DemandError(f"phase must be 'prefill' or 'decode', found {self.phase!r}")
        if not 0 <= self.layer < n_layers:
            raise DemandError(f"layer {self.layer} is outside 0..{n_layers - 1}")
        _check_ids("demand", self.expert_ids, n_experts)
        if np.any(np.diff(self.expert_ids) <= 0):
            raise DemandError("demand: expert_ids must ascend without duplicates")
        if self.n_tokens.shape != self.expert_ids.shape:
            raise DemandError(f"demand: n_tokens has shape {self.n_tokens.shape}, expected {self.expert_ids.shape}")
        if self.n_tokens.size and int(self.n_tokens.min()) < 1:
            raise DemandError("demand: every activated expert needs at least 1 token")
        if self.gate_scores.shape != (n_experts,) or not np.all(np.isfinite(self.gate_scores)):
            raise DemandError(f"demand: gate_scores must be {n_experts} finite numbers")
        for prediction in self.predictions:
            _check_prediction(prediction, self.layer, n_layers, n_experts)


def _check_ids(where: str, ids: npt.NDArray[np.int32], n_experts: int) -> None:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DemandError(f"{where}: expert_ids must be a 1-d integer array, found {ids.dtype}{list(ids.shape)}")
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < n_experts):
        raise DemandError(f"{where}: expert ids must lie in 0..{n_experts - 1}, found {ids.min()}..{ids.max()}")


def _check_prediction(prediction: Prediction, layer: int, n_layers: int, n_experts: int) -> None:
    if not layer < prediction.layer < n_layers:
        raise DemandError(f"prediction for layer {prediction.layer} made at layer {layer} of {n_layers}")
    _check_ids("prediction", prediction.expert_ids, n_experts)
    if not prediction.expert_ids.shape == prediction.n_tokens.shape == prediction.scores.shape:
        raise DemandError("prediction: expert_ids, n_tokens and scores must have one shape")
