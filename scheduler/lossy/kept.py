"""Lossy policies that keep a set of experts a layer and route around the others: ``swapmoe`` and ``emoe``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scheduler.demand import Prediction
from scheduler.errors import PolicyError
from scheduler.lossy.base import LossyPolicy, LossySetting, Rewritten, Routing, renormalised
from scheduler.lossy.replace import replaced
from scheduler.setting import integer, number

SHARE, FORGET = 0.5, 0.5


class Kept(LossyPolicy):
    """The kept experts of each layer are those of the highest ``worth``, as many as the memory budget holds.

    budget: a share of all experts (float in (0, 1]) or their number (int), split evenly over the layers, the first
    ones get what is left; ``budget_bytes`` instead: a size in full precision; neither: as many as there are slots (half
    of all where there are none). An entry of another expert falls to the kept expert that the router likes next (or,
    where the gates are not known, to the one of the highest worth); its weight is scaled by the two gate probabilities
    and the token's weights add up to what they did before. A layer chooses its first set by the first input it sees.
    """

    needs_scores = True

    def __init__(
        self, setting: LossySetting, budget: float | int | None = None, budget_bytes: int | None = None,
        forget: float = FORGET,
    ) -> None:  # fmt: skip
        super().__init__(setting)
        shape = (setting.n_layers, setting.n_experts)
        self.worth, self.kept = np.zeros(shape), np.zeros(shape, np.bool_)
        self.updates = 0
        self.forget = number(self.name, "forget", forget, 0.0, 1.0)
        self._follows_slots = budget is None and budget_bytes is None
        self.budget = self._experts(SHARE if budget is None else budget, budget_bytes)
        self._check(self.budget)

    def rewrite(self, routing: Routing) -> Rewritten:
        layer, ids, weights = routing.layer, routing.expert_ids, routing.weights
        n_experts = routing.resident.size
        self._observe(routing)
        if not self.kept[layer].any():
            self._choose(layer)
        kept = self.kept[layer, :n_experts]
        wanted = (ids >= 0) & ~kept[ids]
        if not wanted.any():
            return Rewritten(ids, weights)
        scores = routing.scores
        worth = np.broadcast_to(self.worth[layer, :n_experts], (len(ids), n_experts))
        liked = worth if scores is None else scores
        new = replaced(ids, weights, wanted, kept, lambda tokens, experts: liked[tokens])
        moved = wanted & (new >= 0)
        scaled = weights.copy()
        if scores is not None:
            tokens = np.nonzero(moved)[0]
            scaled[moved] *= scores[tokens, new[moved]] / np.maximum(scores[tokens, ids[moved]], 1e-20)
        return Rewritten(
            new, renormalised(weights, ids, scaled, new), skipped=int((wanted & (new < 0)).sum()),
            substituted=int(moved.sum()),
        )  # fmt: skip

    def predicted(self, predictions: tuple[Prediction, ...]) -> tuple[Prediction, ...]:
        found = []
        for item in predictions:
            chosen = self.kept[item.layer]
            keep = chosen[item.expert_ids] if chosen.any() else np.ones(item.expert_ids.size, np.bool_)
            found.append(Prediction(item.layer, item.expert_ids[keep], item.n_tokens[keep], item.scores[keep]))
        return tuple(found)

    def resize(self, n_experts: int) -> None:
        """A new budget; each layer that has run chooses anew at once."""
        self._check(n_experts)
        self.budget = n_experts
        for layer in np.flatnonzero(self.kept.any(axis=1)).tolist():
            self._choose(layer)

    def follow_slots(self, n_slots: int) -> None:
        if self._follows_slots and n_slots:
            self.resize(max(n_slots, self.setting.n_layers))

    def as_dict(self) -> dict[str, Any]:
        return {"budget": self.budget, "kept": int(self.kept.sum()), "updates": self.updates}

    def layer_budget(self, layer: int) -> int:
        """Experts that a layer may keep."""
        each, rest = divmod(self.budget, self.setting.n_layers)
        return min(each + (layer < rest), self.setting.n_experts)

    def _observe(self, routing: Routing) -> None:
        raise NotImplementedError

    def _choose(self, layer: int) -> None:
        best = np.argsort(-self.worth[layer], kind="stable")[: self.layer_budget(layer)]
        row = np.zeros(self.setting.n_experts, np.bool_)
        row[best] = True
        self.kept[layer] = row

    def _choose_all(self) -> None:
        """A new set for every layer that has one; what was seen counts less from now on."""
        for layer in np.flatnonzero(self.kept.any(axis=1)).tolist():
            self._choose(layer)
        self.worth *= self.forget
        self.updates += 1

    def _experts(self, budget: float | int, budget_bytes: int | None) -> int:
        total = self.setting.n_layers * self.setting.n_experts
        if budget_bytes is not None:
            n_bytes = integer(self.name, "budget_bytes", budget_bytes, 1)
            return min(total, n_bytes // self.setting.expert_bytes) if self.setting.expert_bytes else total
        if isinstance(budget, float):
            return max(self.setting.n_layers, round(number(self.name, "budget", budget, 0.0, 1.0) * total))
        return integer(self.name, "budget", budget, 1)

    def _check(self, n_experts: int) -> None:
        total = self.setting.n_layers * self.setting.n_experts
        if not self.setting.n_layers <= n_experts <= total:
            raise PolicyError(
                f"{self.name}: a budget of {n_experts} experts; expected one for each of the {self.setting.n_layers}"
                f" layers and at most all {total}"
            )


class SwapMoe(Kept):
    """SwapMoE (arXiv 2308.15030): the virtual experts of a layer are those of the highest importance.

    importance_i = sum over tokens x of |x| * |G(x)_i| * |E_i|: length of the hidden state, gate probability, length of
    the expert's weights (1 where not known). Every ``frequency`` inputs (forward passes) the sets are chosen anew and
    what was seen is multiplied by ``forget``. The budget may change while it runs (``resize``).
    """

    name = "swapmoe"
    needs_norms = True
    needs_expert_norms = True

    def __init__(
        self, setting: LossySetting, budget: float | int | None = None, budget_bytes: int | None = None,
        frequency: int = 16, forget: float = FORGET,
    ) -> None:  # fmt: skip
        super().__init__(setting, budget, budget_bytes, forget)
        self.frequency = integer(self.name, "frequency", frequency, 1)
        self._inputs = 0

    def _observe(self, routing: Routing) -> None:
        layer, n_experts = routing.layer, routing.resident.size
        if layer == 0:
            if self._inputs and self._inputs % self.frequency == 0:
                self._choose_all()
            self._inputs += 1
        ids, norms = routing.expert_ids, self.setting.expert_norms
        length = np.ones(len(ids)) if routing.norms is None else routing.norms.astype(np.float64)
        seen: npt.NDArray[np.float64]
        if routing.scores is not None:
            seen = length @ np.abs(routing.scores)
        else:
            of_token = np.broadcast_to(length[:, None], ids.shape) * np.abs(routing.weights)
            seen = np.bincount(ids[ids >= 0], of_token[ids >= 0], n_experts).astype(np.float64)
        self.worth[layer, :n_experts] += seen * (1.0 if norms is None else norms[layer, :n_experts])


class EMoe(Kept):
    """eMoE (arXiv 2503.06823): which experts to keep is predicted once in ``period`` prompts (the source: 40).

    Experts recur between prompts, so the prediction is the number of tokens that the router sent to each expert since
    the last one, plus ``forget`` times what was counted before. Absent experts fall to the next kept one in the
    router's order.
    """

    name = "emoe"

    def __init__(
        self, setting: LossySetting, budget: float | int | None = None, budget_bytes: int | None = None,
        period: int = 40, forget: float = FORGET,
    ) -> None:  # fmt: skip
        super().__init__(setting, budget, budget_bytes, forget)
        self.period = integer(self.name, "period", period, 1)
        self._prompts = 0

    def begin_sequence(self) -> None:
        if self._prompts and self._prompts % self.period == 0:
            self._choose_all()
        self._prompts += 1

    def _observe(self, routing: Routing) -> None:
        present = routing.expert_ids[routing.expert_ids >= 0]
        self.worth[routing.layer, : routing.resident.size] += np.bincount(present, minlength=routing.resident.size)
