"""Which step a layer call belongs to, and what is counted."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hybrimoe.runtime.layer_call import tallies
from hybrimoe.runtime.layer_call.stats import COUNTED, Counters, StatsRecorder
from hybrimoe.runtime.layer_call.steps import Step, StepTracker
from scheduler import LayerPlan, SlotState, SlotTable, Transfer


def test_a_step_starts_when_the_layer_index_does_not_rise() -> None:
    tracker = StepTracker(decode_max_tokens=2)
    assert tracker.next(0, 9) == Step("prefill", new=True, new_sequence=True)
    assert tracker.next(3, 9) == Step("prefill", new=False, new_sequence=False)
    assert tracker.next(0, 1) == Step("decode", new=True, new_sequence=False)
    assert tracker.next(0, 1) == Step("decode", new=True, new_sequence=False)
    assert tracker.next(0, 9) == Step("prefill", new=True, new_sequence=True)
    assert tracker.next(0, 9) == Step("prefill", new=True, new_sequence=False)


def test_an_announced_step_wins_over_the_number_of_tokens() -> None:
    tracker = StepTracker(decode_max_tokens=4)
    tracker.next(0, 9)
    tracker.announce("decode")
    assert tracker.next(1, 64) == Step("decode", new=True, new_sequence=False)


def test_a_bound_model_tells_decode_of_a_batch_from_a_short_prompt() -> None:
    class Model(nn.Module):
        def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None) -> None: ...

    model, tracker = Model(), StepTracker(decode_max_tokens=4)
    tracker.bind(model)
    model(torch.zeros(8, 1, dtype=torch.int64))
    assert tracker.next(0, 8).phase == "decode"
    model(inputs_embeds=torch.zeros(1, 3, 16))
    assert tracker.next(0, 3).phase == "prefill"
    tracker.unbind()
    model(torch.zeros(8, 1, dtype=torch.int64))
    assert tracker.next(0, 8).phase == "prefill"
    assert not model._forward_pre_hooks


def table_with(resident: list[int], in_flight: list[int]) -> SlotTable:
    table = SlotTable(8, 2, 8)
    for slot, expert in enumerate([*resident, *in_flight]):
        table.begin_transfer(slot, 8 + expert)
        if expert in resident:
            table.end_transfer(slot, 8 + expert)
    return table


def test_hits_misses_and_late_prefetches() -> None:
    recorder = StatsRecorder(2, 8)
    counters = recorder.of("decode", 1)
    recorder.demand(counters, 1, np.array([1, 2, 3, 5], np.int32), 1, (table_with([1, 5, 7], [3]), 1))
    assert (counters.hits, counters.misses, counters.late_prefetches) == (2, 2, 1)
    assert counters.hit_rate == 0.5
    recorder.demand(counters, 1, np.array([0], np.int32), 1, None)
    assert (counters.activated, counters.misses) == (5, 3)
    assert SlotState.RESIDENT < SlotState.PINNED


def test_a_prefetch_is_used_by_the_first_demand_and_wasted_by_eviction() -> None:
    recorder = StatsRecorder(2, 8)
    issued = recorder.of("decode", 0)
    moves = tuple(Transfer(1, expert, expert, None, "prefetch", 1.0, True) for expert in (3, 4, 5))
    recorder.moved(issued, LayerPlan(0, 0, (), (), (), (), moves, 0.0), (100, 200))
    assert issued.transfer_bytes == 600
    for _ in range(2):
        recorder.demand(recorder.of("decode", 1), 1, np.array([3], np.int32), 1, None)
    evicting = Transfer(0, 0, 4, (1, 4), "demand", 1.0, True)
    recorder.moved(recorder.of("decode", 0), LayerPlan(1, 0, (), (), (), (evicting,), (), 0.0), (100, 200))
    assert (issued.prefetches, issued.prefetches_used, issued.prefetches_wasted) == (3, 1, 1)
    assert issued.prefetch_precision == 0.5


def test_rates_of_nothing_are_unknown_not_zero() -> None:
    assert Counters().hit_rate is None
    assert Counters().prefetch_precision is None
    assert Counters().as_dict()["hit_rate"] is None


def test_calls_that_were_only_kept_are_in_every_sum_once_and_gone_after_a_reset() -> None:
    stats = StatsRecorder(2, 8)
    stats.whole += [("decode", 1, 1, 4, 5_000, 7_000), ("prefill", 0, 3, 6, 1_000, 1_000)]
    for _ in range(2):
        by_phase, by_layer = stats.by_phase(), stats.by_layer()
        assert (by_phase["decode"].calls, by_phase["decode"].cpu_experts, by_phase["decode"].cpu_us) == (1, 4, 5.0)
        assert (by_layer[1].wall_us, by_layer[1].overhead_us) == (7.0, 2.0)
        assert (by_phase["prefill"].tokens, by_layer[0].misses) == (3, 6)
    stats.whole.append(("decode", 1, 1, 4, 5_000, 7_000))
    stats.reset()
    assert stats.by_phase()["decode"].calls == 0


def test_an_announced_step_is_new_whichever_layer_comes() -> None:
    tracker = StepTracker(decode_max_tokens=2)
    assert tracker.next(0, 1).new
    assert tracker.last_layer == 0
    tracker.announce("decode")
    assert tracker.last_layer > 1 << 30, "no layer goes on with the step"
    assert tracker.next(5, 1) == Step("decode", new=True, new_sequence=False)
    assert tracker.next(6, 1) == Step("decode", new=False, new_sequence=False)


def test_compiled_code_counts_in_the_columns_of_these_names() -> None:
    assert len(COUNTED) == tallies.N_TALLIES
    for place, name in enumerate(COUNTED[: tallies.WALL_US + 1]):
        assert getattr(tallies, name.upper()) == place
    counters = Counters(calls=2, wall_us=1.5)
    assert (counters.calls, counters.wall_us, type(counters.calls), type(counters.wall_us)) == (2, 1.5, int, float)
    assert repr(counters) == "Counters(calls=2, wall_us=1.5)"
    counters.hits += 3
    assert counters.since(Counters(calls=1)).as_dict()["hits"] == counters.hits == 3
    assert counters == Counters(calls=2, hits=3, wall_us=1.5)
