"""A demand that breaks a rule is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from scheduler.demand import DemandError, LayerDemand, Prediction

IDS = np.array([1, 3], np.int32)
GOOD = LayerDemand(0, "decode", 1, IDS, np.ones(2, np.int32), np.full(4, 0.25, np.float32))


def prediction(**changes: Any) -> Prediction:
    """A good one of layer 1, with other fields."""
    fields: dict[str, Any] = {"layer": 1, "expert_ids": IDS, "n_tokens": np.ones(2, np.int32)}
    return Prediction(**fields | {"scores": np.ones(2, np.float32)} | changes)


def test_a_good_demand_passes() -> None:
    dataclasses.replace(GOOD, predictions=(prediction(),)).validate(2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "training"}, "phase must be"),
        ({"layer": 2}, r"layer 2 is outside 0\.\.1"),
        ({"expert_ids": np.array([1.0, 3.0])}, "1-d integer array, found float64"),
        ({"expert_ids": np.array([1, 4], np.int32)}, r"must lie in 0\.\.3, found 1\.\.4"),
        ({"expert_ids": np.array([3, 1], np.int32)}, "ascend without duplicates"),
        ({"n_tokens": np.ones(3, np.int32)}, "n_tokens has shape"),
        ({"n_tokens": np.array([1, 0], np.int32)}, "at least 1 token"),
        ({"gate_scores": np.full(4, np.nan, np.float32)}, "4 finite numbers"),
        ({"predictions": (prediction(layer=0),)}, "prediction for layer 0 made at layer 0"),
        ({"predictions": (prediction(scores=np.ones(3, np.float32)),)}, "must have one shape"),
    ],
)
def test_a_demand_that_breaks_a_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DemandError, match=message):
        dataclasses.replace(GOOD, **changes).validate(2, 4)
