"""Where a reply's time went: parts that add up to it, in each of the ways in which a step can run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import hybrimoe
from hybrimoe.generation import Profile, SamplingOptions, TextGenerator
from hybrimoe.generation.module_parts import module_parts
from hybrimoe.generation.profile import PARTS, Stopwatch, split_experts
from hybrimoe.runtime.layer_call.stats import Counters

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import Letters
from tiny_families import tiny_model as tiny_family

NEW_TOKENS = 40
OPTIONS = SamplingOptions(temperature=0.8, seed=3, max_new_tokens=NEW_TOKENS, ignore_eos=True)
CLOSE = 0.03
"""What the parts may differ from the time measured beside them, as a share."""
MOST_REPLIES = 8
WAYS: dict[str, dict[str, Any]] = {
    "compiled": {"accelerator": "none", "expert_dtype": "int8"},
    "transformers": {"accelerator": "none", "expert_dtype": "float32", "step": "transformers"},
    "slots": {"accelerator": "emulated", "gpu_expert_slots": 8, "expert_dtype": "int8"},
}


def profiled(model: Any, n_prompt: int = 60) -> tuple[Any, dict[str, Any]]:
    generator = TextGenerator(model, Letters())
    reply = generator.reply([3 + at % 90 for at in range(n_prompt)], OPTIONS, profile=Profile(model))
    "".join(reply)
    return reply, reply.profile.as_dict()


@pytest.mark.parametrize("way", [None, *WAYS])
def test_the_parts_add_up_to_the_measured_time(way: str | None) -> None:
    model = tiny_family("qwen2_moe")
    if way is not None:
        hybrimoe.inject(model, **WAYS[way])
    profiled(model)  # what is compiled or measured once has been
    n_replies = 1
    while n_replies < MOST_REPLIES:  # a process that is put aside between two clocks makes them differ
        n_replies += 1
        reply, phases = profiled(model)
        measured = {"prefill": reply.times.ttft_us, "decode": reply.times.decode_us}
        if all(phases[phase]["us"] == pytest.approx(us, rel=CLOSE) for phase, us in measured.items()):
            break
    assert phases["prefill"]["tokens"] == 60
    assert phases["decode"]["tokens"] == NEW_TOKENS - 1
    for phase, measured_us in measured.items():
        parts = phases[phase]["parts_us"]
        assert set(parts) == set(PARTS)
        assert all(us >= 0 for us in parts.values()), parts
        assert sum(parts.values()) == pytest.approx(phases[phase]["us"])
        assert sum(parts.values()) == pytest.approx(measured_us, rel=CLOSE)
        for part in ("norms", "projections", "attention", "router", "experts_cpu", "shared_experts", "output_layer"):
            assert parts[part] > 0, (phase, part)
    decode = phases["decode"]["parts_us"]
    assert decode["sampling"] > 0
    assert decode["detokenising"] > 0
    assert (decode["planning"] > 0) == (way in ("transformers", "slots")), "a compiled step plans nothing"
    assert (decode["experts_accelerator"] + decode["experts_link"] > 0) == (way == "slots")
    if way == "compiled":
        assert model.hybrimoe.step.n_steps == n_replies * NEW_TOKENS, (
            "the prompt is a step, too; a profile does not change how steps run"
        )


def test_a_slow_first_step_does_not_distort_those_after_it() -> None:
    class Metered:
        readings = iter([({"norms": 10, "experts": 90}, 1e6), ({"norms": 40, "experts": 160}, 1e6 + 50.0)])

        def meter(self) -> tuple[dict[str, int], float]:
            return next(self.readings)

    profile = Profile(tiny_family("olmoe"))
    profile._step = Metered()
    profile.forwarding(lambda: None)()
    assert profile._stepped == {"norms": 15.0, "experts": 35.0}


def test_a_profile_changes_no_token_and_leaves_no_hook() -> None:
    model = tiny_family("qwen2_moe")
    hybrimoe.inject(model, accelerator="none", expert_dtype="float32", step="transformers")
    hooks = [len(module._forward_hooks) for module in model.modules()]
    plain = TextGenerator(model, Letters()).reply(list(range(3, 63)), OPTIONS)
    "".join(plain)
    assert plain.profile is None
    reply = TextGenerator(model, Letters()).reply(list(range(3, 63)), OPTIONS, profile=Profile(model))
    pieces = iter(reply)
    next(pieces)
    assert [len(module._forward_hooks) for module in model.modules()] != hooks
    "".join(pieces)
    assert reply.token_ids == plain.token_ids
    left = TextGenerator(model, Letters()).reply(list(range(3, 63)), OPTIONS, profile=Profile(model))
    for _ in left:
        break  # whoever reads leaves
    del left, pieces
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize(
    ("family", "without"),
    [("qwen2_moe", set()), ("gpt_oss", {"shared_experts"}), ("deepseek_v3", set()), ("qwen3_next", set())],
)
def test_modules_are_told_by_what_they_are(family: str, without: set[str]) -> None:
    model = tiny_family(family)
    hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    parts = module_parts(model)
    expected = {"norms", "projections", "attention", "router", "experts", "shared_experts", "output_layer"} - without
    assert set(parts.values()) == expected
    told = {path.rpartition(".")[2]: part for path, part in parts.items()}
    assert told["lm_head"] == "output_layer"
    assert told["experts"] == "experts"
    for name in ("q_proj", "o_proj", "kv_b_proj"):
        assert told.get(name, "projections") == "projections"


def test_a_moment_belongs_to_the_innermost_part() -> None:
    now = [0]
    watch = Stopwatch(lambda: now[0])

    def after(ns: int) -> None:
        now[0] += ns

    after(1_000)
    watch.begin("attention")
    after(2_000)
    watch.begin("projections")
    after(4_000)
    watch.end()
    after(8_000)
    watch.end()
    after(16_000)
    assert watch.take_us() == {"framework": 17.0, "attention": 10.0, "projections": 4.0}
    after(32_000)
    assert watch.take_us() == {"framework": 32.0}


def counted(**sums: float) -> dict[str, Counters]:
    return {"layer": Counters(**sums)}  # type: ignore[arg-type]


def test_waiting_is_the_links_while_the_accelerator_has_nothing_to_compute() -> None:
    before = counted()
    waited = {"wall_us": 100.0, "overhead_us": 20.0, "cpu_us": 30.0, "accel_experts": 2}  # 50 us after the CPU lane
    after = counted(**waited, accel_us=60.0, link_us=500.0)
    lanes = split_experts(110.0, 0.0, before, after)
    assert lanes == {
        "experts_cpu": 30.0, "experts_disk": 0.0, "experts_link": 20.0, "experts_accelerator": 30.0, "planning": 30.0
    }  # fmt: skip
    on_disk = split_experts(110.0, 0.0, before, counted(**waited, accel_us=60.0, link_us=500.0, disk_wait_us=20.0))
    assert (on_disk["experts_disk"], on_disk["experts_link"], on_disk["experts_accelerator"]) == (20.0, 20.0, 10.0)
    busy = split_experts(110.0, 0.0, before, counted(**waited, accel_us=90.0, link_us=500.0))
    assert busy["experts_link"] == 0.0
    idle_link = split_experts(110.0, 0.0, before, counted(**waited, accel_us=60.0, link_us=5.0))
    assert idle_link["experts_link"] == 5.0, "no more than the link moved bytes"


def test_experts_of_compiled_steps_are_not_counted_twice() -> None:
    after = counted(wall_us=100.0, overhead_us=0.0, cpu_us=100.0)
    assert split_experts(0.0, 100.0, counted(), after)["experts_cpu"] == 0.0
    assert split_experts(45.0, 60.0, counted(), after) == {
        "experts_cpu": 40.0, "experts_disk": 0.0, "experts_accelerator": 0.0, "experts_link": 0.0, "planning": 5.0
    }  # fmt: skip


def test_a_model_without_a_session_runs_its_experts_itself() -> None:
    assert split_experts(70.0, 0.0, {}, {}) == {"experts_cpu": 70.0}
