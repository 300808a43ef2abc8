"""Which expert is used how often, and which is in a slot: what the heat map shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import TypedDict

if TYPE_CHECKING:
    from hybrimoe.runtime.session import Session

__all__ = ["ExpertMap", "read_experts"]

NO_SLOT = -1


class LayerExperts(TypedDict):
    """One layer. uses: calls of the layer in which each expert was active, since the start; slots: the slot of each
    expert, -1 for none; accelerator: index of the layer's."""

    path: str
    accelerator: int
    uses: list[int]
    slots: list[int]


class ExpertMap(TypedDict):
    """GET /hybrimoe/experts. Empty where no expert has a slot: uses are not told apart there."""

    layers: list[LayerExperts]


def read_experts(session: Session | None) -> ExpertMap:
    """The map as it is now. Waits for the layer that runs, so the event loop should not call it."""
    uses = None if session is None else session.expert_uses
    if session is None or uses is None:
        return {"layers": []}
    slots = [[NO_SLOT] * layer.num_experts for layer in session.layers]
    for slot, (layer, expert) in session.slot_contents().items():
        slots[layer][expert] = slot
    home = {layer: unit.index for unit in session.units for layer in unit.layers}
    return {
        "layers": [
            {
                "path": layer.path,
                "accelerator": home[index],
                "uses": [int(n) for n in uses[index, : layer.num_experts]],
                "slots": slots[index],
            }
            for index, layer in enumerate(session.layers)
        ]
    }
