"""What a failed lane is told with: the latest events of the experts whose copy or computation it was."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_kernels import LaneError, LostError
from hybrimoe.runtime.layer_call.routing import CallSpace
from scheduler.planner.protocol import LayerPlanner


def with_story(error: LaneError, planner: LayerPlanner | None, layer: int, experts: Iterable[int]) -> LaneError:
    """The error with the story of `experts` of a layer, as the slot table remembers it."""
    if planner is None or isinstance(error, LostError):  # of a lost accelerator no expert is to blame
        return error
    table, own = planner.table(layer)
    stories = []
    for expert in experts:
        key = own * table.n_experts + expert
        slot = int(table.slot_of[key])
        story = table.story(None if slot < 0 else slot, key)
        stories.append(f"latest events of layer {layer} expert {expert}: {'; '.join(story) or 'none'}")
    return LaneError(". ".join([str(error), *stories]))


def failed_experts(space: CallSpace) -> list[int]:
    """Experts of the first piece of work on the accelerator that failed; of all of them where none says so."""
    sent = [position for positions in space.sent for position in positions]
    for end, positions in zip(space.ends, space.sent, strict=True):
        try:
            end.wait()
        except LaneError:
            sent = positions
            break
    return [int(space.demand.expert_ids[position]) for position in sent]
