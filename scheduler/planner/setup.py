"""What a planner is made from, as data: of one accelerator, or of several with a block of layers each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scheduler.machine.costs import CostModel
from scheduler.plan import Placement
from scheduler.planner.group import PlannerGroup
from scheduler.planner.layer_blocks import Block
from scheduler.planner.planner import Planner
from scheduler.planner.protocol import LayerPlanner


@dataclass(frozen=True, slots=True)
class PlannerSetup:
    """``costs``: of each accelerator, over its own layers; ``blocks``: theirs, over ``placements`` (all layers).

    ``params`` are the policy's. Costs are kept as they are when ``as_mapping`` or ``planner`` is called.
    """

    n_experts: int
    costs: Sequence[CostModel]
    blocks: Sequence[Block]
    placements: Sequence[Placement]
    policy: str = "ours"
    lookahead: int = 3
    params: Mapping[str, Any] = field(default_factory=dict)

    def planner(self) -> LayerPlanner:
        """A ``Planner`` for one accelerator, else a ``PlannerGroup``. Raises SchedulerError for what cannot be."""
        if len(self.blocks) == 1:
            return self._of(self.blocks[0], self.costs[0])
        costs = iter(self.costs)
        return PlannerGroup(self.blocks, lambda block: self._of(block, next(costs)))

    def _of(self, block: Block, costs: CostModel) -> Planner:
        return Planner(
            block.n_layers, self.n_experts, block.n_slots, costs, policy=self.policy, lookahead=self.lookahead,
            placements=self.placements[block.first_layer : block.first_layer + block.n_layers],
            first_layer=block.first_layer, first_slot=block.first_slot,
            **self.params,
        )  # fmt: skip

    def as_mapping(self) -> dict[str, Any]:
        """Plain data that ``from_mapping`` reads."""
        return {
            "n_experts": self.n_experts, "costs": [model.as_mapping() for model in self.costs],
            "blocks": [list(block) for block in self.blocks], "placements": list(self.placements),
            "policy": self.policy, "lookahead": self.lookahead, "params": dict(self.params),
        }  # fmt: skip

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> PlannerSetup:
        """The setup that ``as_mapping`` described. Raises TypeError or KeyError for what it does not write."""
        known = cls(**values)
        costs = [CostModel.from_mapping(model) for model in values["costs"]]
        return replace(known, costs=costs, blocks=[Block(*block) for block in values["blocks"]])
