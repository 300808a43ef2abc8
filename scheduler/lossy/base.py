"""The interface of a lossy policy: routing of one layer in, other routing out, with what was lost counted.

A lossy policy runs between the router and the planner. It may skip a routed expert, put another in its place, or ask
for the low-precision copy. It is pure: what is resident and what the gates say is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from scheduler.demand import Phase, Prediction
from scheduler.errors import DemandError, PolicyError

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

ABSENT: Final = -1
FULL, LOW, DEFERRED = 0, 1, 2
"""Parts: experts as stored, their low-precision copies, and experts whose result the next MoE layer adds."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What the router of one layer gave, and what may be looked at beside it.

    expert_ids int32[T, k], -1 absent; weights float32[T, k]; resident bool[E]: bytes are in a full-precision slot;
    scores float32[T, E]: gate probabilities of all experts, None where they are not known;
    norms float32[T]: length of each token's hidden state, None where it is not known.
    """

    layer: int
    phase: Phase
    expert_ids: Ids
    weights: Floats
    resident: npt.NDArray[np.bool_]
    scores: Floats | None = None
    norms: Floats | None = None

    def validate(self) -> None:
        """Raises DemandError unless shapes and ids fit each other. For borders and tests."""
        n_experts = self.resident.size
        if self.expert_ids.ndim != 2 or self.weights.shape != self.expert_ids.shape:
            raise DemandError(f"routing: ids {self.expert_ids.shape} and weights {self.weights.shape} must be [T, k]")
        if self.expert_ids.size and not -1 <= int(self.expert_ids.min()) <= int(self.expert_ids.max()) < n_experts:
            raise DemandError(f"routing: expert ids must lie in -1..{n_experts - 1}")
        expected = (len(self.expert_ids), n_experts)
        if self.scores is not None and self.scores.shape != expected:
            raise DemandError(f"routing: scores must be {list(expected)}, found {list(self.scores.shape)}")


@dataclass(frozen=True, slots=True, eq=False)
class Rewritten:
    """Routing to run in place of the router's. expert_ids int32[T, k], -1 absent or skipped; weights float32[T, k].

    parts uint8[T, k]: FULL, LOW or DEFERRED of each entry; None where all are FULL. whole bool[E]: experts that need
    all bits, where there are bit planes; None: all. The counts are (token, expert) pairs.
    """

    expert_ids: Ids
    weights: Floats
    parts: npt.NDArray[np.uint8] | None = None
    whole: npt.NDArray[np.bool_] | None = None
    skipped: int = 0
    substituted: int = 0
    lowered: int = 0


@dataclass(slots=True, eq=False)
class LossySetting:
    """What a lossy policy may know of the model when it is made.

    expert_norms float32[L, E]: length of each expert's weights (None: taken as equal). expert_bytes: one record in full
    precision, low_bytes: one of its low copy. router(layer): the router's matrix float32[E, H], None where it is not
    known (yet). low_errors float64[L, E]: relative error of each expert's output from its copy; frequencies
    float64[L, E]: how often it is used (None: taken as equal). exists bool[L, E]: layers may have fewer experts than E.
    """

    n_layers: int
    n_experts: int
    expert_bytes: int = 0
    expert_norms: Floats | None = None
    router: Callable[[int], Floats | None] = field(default=lambda layer: None)
    low_bytes: int = 0
    low_errors: npt.NDArray[np.float64] | None = None
    frequencies: npt.NDArray[np.float64] | None = None
    exists: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), np.bool_))

    def __post_init__(self) -> None:
        if not self.exists.size:
            self.exists = np.ones((self.n_layers, self.n_experts), np.bool_)


class LossyPolicy:
    """A lossy policy. Parameters are keywords of ``__init__`` after ``setting``; PolicyError for what cannot be.

    uses_low_copy: entries may be LOW, so a low-precision copy of the experts is needed. uses_planes: experts cross the
    link as bit planes (int4 only). needs_scores, needs_norms,
    needs_expert_norms: what ``Routing`` and ``LossySetting`` must bring for it to work as its source says. one_copy: an
    expert is only ever used in one of the two precisions; ``low`` bool[L, E] says which have the low one.
    """

    name: ClassVar[str]
    uses_low_copy: ClassVar[bool] = False
    uses_planes: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False
    needs_expert_norms: ClassVar[bool] = False
    one_copy: ClassVar[bool] = False

    def __init__(self, setting: LossySetting) -> None:
        self.setting = setting
        self.low = np.zeros((0, 0), np.bool_)

    def begin_sequence(self) -> None:
        """A new prompt starts."""

    def rewrite(self, routing: Routing) -> Rewritten:
        """The routing to run instead."""
        raise NotImplementedError

    def predicted(self, predictions: tuple[Prediction, ...]) -> tuple[Prediction, ...]:
        """Predicted demand of the full-precision experts after this policy."""
        return predictions

    def resize(self, n_experts: int) -> None:
        """A new memory budget, in experts over all layers. Raises PolicyError where there is none to change."""
        raise PolicyError(f"{self.name} has no memory budget that could be changed; swapmoe and emoe have one")

    def follow_slots(self, n_slots: int) -> None:
        """The accelerator has so many full-precision slots from now on; for budgets that were not given."""

    def as_dict(self) -> dict[str, Any]:
        """What the policy believes now, for statistics. Plain data."""
        return {}


def router_order(weights: Floats, expert_ids: Ids) -> npt.NDArray[np.intp]:
    """[T, k]: columns by falling weight, absent entries last; ties keep the router's order."""
    return np.argsort(np.where(expert_ids >= 0, -weights, np.inf), axis=1, kind="stable")


def shares(weights: Floats, expert_ids: Ids) -> npt.NDArray[np.float64]:
    """float64[T, k]: weights of each token divided by their sum; 0 for absent entries."""
    present = np.where(expert_ids >= 0, weights, np.float32(0.0)).astype(np.float64)
    total = present.sum(axis=1, keepdims=True)
    return np.asarray(present / np.where(total > 0.0, total, 1.0))


def renormalised(before: Floats, old_ids: Ids, after: Floats, new_ids: Ids) -> Floats:
    """Weights whose sum over a token's present entries is what the router gave it in all; untouched tokens keep their
    bits."""
    given = np.where(old_ids >= 0, before, np.float32(0.0)).sum(axis=1, keepdims=True)
    left = np.where(new_ids >= 0, after, np.float32(0.0)).sum(axis=1, keepdims=True)
    touched = ((old_ids != new_ids) | (before != after)).any(axis=1, keepdims=True) & (left > 0.0)
    scaled = after * (given / np.where(left > 0.0, left, np.float32(1.0)))
    return np.asarray(np.where(touched, scaled, after), np.float32)
