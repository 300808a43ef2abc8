"""Steps whose pieces are recorded and replayed: on noted graphs, which run the recorded operations on the host."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import hybrimoe
from gpu_kernels import TorchAccelerator
from gpu_kernels.errors import GraphError
from gpu_kernels.step_kernels import StepKernels
from hybrimoe.runtime.startup.budget import RECORDED_STEPS
from hybrimoe.step.build import StepWay, capture_step
from hybrimoe.step.captured import LEAST_REPLAYS, CapturedStep
from hybrimoe.step.fused_norms import known_norms
from tests.fake_device.graphs import NotedGraphs

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from family_check import outputs
from tiny_families import FAMILIES, prompt, tiny_model

HOST = torch.device("cpu")
CAPTURED = (
    "mixtral", "gpt_oss", "deepseek_v2", "llama4", "gemma4",
    "qwen3_next", "nemotron_h", "inkling",
    "deepseek_v32", "glm5_next",
    "longcat_flash",
)  # fmt: skip
"""Some of each kind (`tests/families` has all): keys and values of every token or of windows; states of linear
attention or Mamba, alone or beside keys and values; attention to tokens that an index chooses, which glm5_next asks in
the middle how many there are; experts that are the identity."""
TOLERANCE = 1e-4
ROOM = 4
"""Tokens of room of new buffers in the test of growth."""


def captured(model: Any) -> tuple[StepWay, NotedGraphs]:
    """A model with slots on the emulated accelerator, and its captured step."""
    injection = hybrimoe.inject(model, accelerator="emulated", gpu_expert_slots=4, expert_dtype="float32")
    graphs = NotedGraphs()
    injection.way = capture_step(model, injection.session, HOST, graphs)
    return injection.way, graphs


@pytest.mark.parametrize("family", CAPTURED)
def test_a_family_runs_captured(family: str) -> None:
    model = tiny_model(family)
    plain = outputs(model)
    way, graphs = captured(model)
    assert isinstance(way.step, CapturedStep), way.reason
    recorded = graphs.n_recorded
    found = outputs(model)
    assert way.step.n_steps > 0
    assert graphs.n_recorded > recorded
    assert float((found.decode - plain.decode).abs().max()) <= TOLERANCE
    assert torch.equal(found.tokens, plain.tokens)
    model.hybrimoe.restore()
    after = outputs(model)
    assert torch.equal(after.decode, plain.decode)
    assert "forward" not in vars(model)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, n_past: torch.Tensor,
    first: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """What a card's kernel computes, by torch: of the tokens held alone, whose number only the device knows."""
    held = torch.arange(keys.shape[2]) <= n_past - first
    assert mask is not None
    wide = [part.repeat_interleave(query.shape[1] // keys.shape[1], dim=1) for part in (keys, values)]
    scores = (query @ wide[0].transpose(2, 3)) * scale
    return (scores.masked_fill(~(held & mask), -torch.inf).softmax(-1) @ wide[1]).transpose(1, 2)


def norm_rows(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, round_first: bool) -> torch.Tensor:
    """What a card's kernel computes, by torch."""
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    wide = wide.to(x.dtype).float() if round_first else wide
    return (wide * (weight.float() + offset)).to(x.dtype)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "mixtral", "cohere2_moe", "gemma4", "qwen3_next"])
def test_attention_and_norms_by_kernels(family: str) -> None:
    model = tiny_model(family)
    plain = outputs(model)
    injection = hybrimoe.inject(model, accelerator="emulated", gpu_expert_slots=4, expert_dtype="float32")
    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        calls[name] += 1
        return kernel(*args)

    kernels = StepKernels(partial(counted, "attention", attend), partial(counted, "norm", norm_rows))
    injection.way = capture_step(model, injection.session, HOST, NotedGraphs(), kernels)
    assert injection.step is not None, injection.way
    n_layers = len([module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")])
    n_linear = getattr(model.config, "layer_types", []).count("linear_attention")
    calls.clear()
    found = outputs(model)
    assert calls["attention"] == 2 * (n_layers - n_linear), "once to warm up and once to record"
    assert (calls["norm"] >= 2 * (2 * n_layers + 1)) == (family != "cohere2_moe"), "cohere's is no RMSNorm"
    assert float((found.decode - plain.decode).abs().max()) <= TOLERANCE
    assert torch.equal(found.tokens, plain.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_norms_are_known(dtype: torch.dtype) -> None:
    """Told by what they compute: rounded first or last, with or without one added to the weight, or otherwise."""

    class NormRMSNorm(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.weight, self.eps, self.kind = nn.Parameter(torch.ones(32, dtype=dtype)), 1e-5, kind

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.kind == "other":
                return x / x.norm(dim=-1, keepdim=True) * self.weight
            return norm_rows(x, self.weight, self.eps, 1.0 if "one" in self.kind else 0.0, "first" in self.kind)

    kinds = ["first", "last", "one, first", "one, last", "other"]
    model = nn.ModuleList([NormRMSNorm(kind) for kind in kinds])
    for kind, module in zip(kinds, model, strict=True):
        (known,) = known_norms(nn.ModuleList([module]), norm_rows) or [None]
        if kind == "other":
            assert known is None
            continue
        assert known is not None
        assert known.offset == (1.0 if "one" in kind else 0.0)
        assert dtype == torch.float32 or known.round_first == ("first" in kind)


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_model("qwen2_moe")


@pytest.fixture(scope="module")
def model() -> Any:
    own = tiny_model("qwen2_moe")
    assert captured(own)[0].step is not None
    return own


def after_prompt(model: Any, ids: torch.Tensor, **kwargs: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, **kwargs)
    return cache


def step(model: Any, ids: torch.Tensor, cache: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, **kwargs).logits
    return logits


def steps_of(model: Any) -> tuple[int, int]:
    return model.hybrimoe.step.n_steps, model.hybrimoe.step.captures


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_several_sequences(model: Any, plain: Any, batch: int) -> None:
    ids, new = prompt(batch), prompt(batch, seed=1)[:, :2]
    n_steps, _ = steps_of(model)
    mine, theirs = after_prompt(model, ids), after_prompt(plain, ids)
    for number in range(2):
        assert same(step(model, new[:, [number]], mine), step(plain, new[:, [number]], theirs))
    assert steps_of(model)[0] == n_steps + 2
    assert mine.get_seq_length() == theirs.get_seq_length()


def test_what_is_left_to_transformers(model: Any, plain: Any) -> None:
    """Several new tokens, more sequences, hidden tokens, gradients: answered as ever, and the cache goes on."""
    before = steps_of(model)
    ids, new = prompt(2), prompt(2, seed=1)
    hidden = torch.ones(2, ids.shape[1], dtype=torch.int64)
    hidden[0, :2] = 0
    longer = torch.cat([hidden, torch.ones(2, 1, dtype=torch.int64)], dim=1)
    mine, theirs = (after_prompt(each, ids, attention_mask=hidden) for each in (model, plain))
    found, expected = (
        step(each, new[:, :1], cache, attention_mask=longer) for each, cache in ((model, mine), (plain, theirs))
    )
    assert same(found, expected)
    assert same(step(model, new[:, :3], after_prompt(model, ids)), step(plain, new[:, :3], after_prompt(plain, ids)))
    many, one = prompt(9), prompt(9, seed=1)[:, :1]
    assert same(step(model, one, after_prompt(model, many)), step(plain, one, after_prompt(plain, many)))
    assert model(input_ids=new[:, :1], past_key_values=after_prompt(model, ids)).logits.requires_grad
    assert steps_of(model) == before


def test_both_ways_alternate_on_one_cache(model: Any, plain: Any) -> None:
    ids, new = prompt(), prompt(seed=1)
    mine, theirs = after_prompt(model, ids), after_prompt(plain, ids)
    n_steps, _ = steps_of(model)
    at = 0
    for n_new in (1, 2, 1, 1, 3, 1):
        part = torch.cat([new, new], dim=1)[:, at : at + n_new]
        assert same(step(model, part, mine), step(plain, part, theirs))
        at += n_new
    assert steps_of(model)[0] == n_steps + 4
    mine.crop(-3)
    theirs.crop(-3)
    assert same(step(model, new[:, :1], mine), step(plain, new[:, :1], theirs))


def test_buffers_that_grow_are_recorded_anew_and_others_are_not(
    model: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrimoe.step.captured.LEAST_ROOM", ROOM)
    ids = prompt()
    mine, theirs = after_prompt(model, ids), after_prompt(plain, ids)
    n_steps, captures = steps_of(model)
    for number in range(1, 3 * ROOM):
        assert same(step(model, ids[:, :1], mine), step(plain, ids[:, :1], theirs))
        assert steps_of(model) == (n_steps + number, captures + 1 + (number - 1) // (ROOM + 1))
    assert mine.layers[0].buffers.keys.shape[-2] >= mine.get_seq_length()


def test_conversations_keep_their_graphs_and_ended_ones_are_let_go(model: Any) -> None:
    ids = prompt()
    caches = [after_prompt(model, ids) for _ in range(RECORDED_STEPS)]
    for cache in caches:
        step(model, ids[:, :1], cache)
    _, captures = steps_of(model)
    for cache in caches:
        step(model, ids[:, :1], cache)
    assert steps_of(model)[1] == captures
    buffers = [cache.layers[0].buffers.keys for cache in caches]
    del caches, cache
    step(model, ids[:, :1], after_prompt(model, ids))
    kept = [pieces.held[0].buffers.keys for pieces in model.hybrimoe.step._captured]
    assert not any(held is gone for held in kept for gone in buffers)


def test_as_many_conversations_keep_their_graphs_as_take_turns(model: Any) -> None:
    ids, own = prompt(), model.hybrimoe.step
    caches = [after_prompt(model, ids) for _ in range(RECORDED_STEPS + 2)]
    own.keep_for(len(caches))
    try:
        for cache in caches:
            step(model, ids[:, :1], cache)
        _, captures = steps_of(model)
        for cache in caches:
            step(model, ids[:, :1], cache)
        assert steps_of(model)[1] == captures
    finally:
        own.keep_for(1)


def test_experts_that_fail_leave_the_cache_as_it_was(model: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt()
    mine, theirs = after_prompt(model, ids), after_prompt(plain, ids)
    step(model, ids[:, :1], mine)
    step(plain, ids[:, :1], theirs)

    def fail(*args: Any) -> torch.Tensor:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(type(model.hybrimoe.session), "run_layer", fail)
        with pytest.raises(ZeroDivisionError):
            step(model, ids[:, 1:2], mine)
    assert mine.get_seq_length() == theirs.get_seq_length()
    assert same(step(model, ids[:, 1:2], mine), step(plain, ids[:, 1:2], theirs))


def test_hooks_inside_the_model_are_called(model: Any) -> None:
    """A hook in a piece sends the step to transformers' way; one on experts is called by the captured step as well."""
    ids, calls = prompt(), []
    experts = model.model.layers[0].mlp.experts
    n_steps, _ = steps_of(model)
    handle = experts.register_forward_hook(lambda *_: calls.append("experts"))
    step(model, ids[:, :1], after_prompt(model, ids))
    assert (steps_of(model)[0], calls) == (n_steps + 1, ["experts", "experts"])
    handle.remove()
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("attention"))
    step(model, ids[:, :1], after_prompt(model, ids))
    handle.remove()
    assert (steps_of(model)[0], calls[2:]) == (n_steps + 1, ["attention", "attention"])


def test_a_model_that_asks_the_device_is_left_to_transformers_with_the_reason() -> None:
    model = tiny_model("qwen2_moe")
    own = type(model.model.norm).forward

    def asking(hidden: torch.Tensor) -> torch.Tensor:
        return own(model.model.norm, hidden * (1.0 if float(hidden.sum()) else 2.0))

    model.model.norm.forward = asking
    way, _ = captured(model)
    assert way.step is None
    assert way.reason is not None
    assert "cannot be captured" in way.reason
    assert "transformers" in way.described()["model"]


def test_a_step_that_would_differ_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that counts its calls in Python gives a recording what it gave once."""
    model = tiny_model("qwen2_moe")
    own, calls = type(model.model.norm).forward, []

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(hidden)
        return own(model.model.norm, hidden) + torch.arange(hidden.shape[-1]) * len(calls)

    model.model.norm.forward = counting
    way, _ = captured(model)
    assert way.step is None
    assert way.reason is not None
    assert "differs" in way.reason


def test_every_kind_of_family_is_known() -> None:
    assert set(CAPTURED) <= set(FAMILIES)


@pytest.fixture(scope="module")
def resident_model() -> Any:
    """Every expert in a slot of torch's CPU device, which computes them as a card does."""
    own = tiny_model("qwen2_moe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybrimoe.runtime.session.open_devices", lambda config: [TorchAccelerator("cpu", fused=False)])
        injection = hybrimoe.inject(own, accelerator="emulated", gpu_expert_slots=1.0, expert_dtype="float32")
    injection.way = capture_step(own, injection.session, HOST, NotedGraphs())
    assert injection.step is not None, injection.way
    return own


def test_experts_that_all_have_slots_are_part_of_the_graph(resident_model: Any, plain: Any) -> None:
    ids, new = prompt(), prompt(seed=1)
    mine, theirs = after_prompt(resident_model, ids), after_prompt(plain, ids)
    step(resident_model, new[:, :1], mine)
    step(plain, new[:, :1], theirs)
    resident = resident_model.hybrimoe.session.resident()
    assert resident is not None
    resident_model.hybrimoe.session.reset_stats()
    for number in range(1, 4):
        found = step(resident_model, new[:, number : number + 1], mine)
        assert same(found, step(plain, new[:, number : number + 1], theirs))
    (pieces,) = [each for each in resident_model.hybrimoe.step._captured if each.within is resident]
    assert len(pieces.graphs) == 1
    counted = resident_model.hybrimoe.stats().by_phase["decode"]
    n_layers, top_k = len(pieces.inside), plain.config.num_experts_per_tok
    assert (counted.calls, counted.tokens) == (3 * n_layers, 3 * n_layers)
    assert counted.hits == counted.accel_experts == counted.activated == 3 * n_layers * top_k
    assert counted.accel_us > 0


def test_absent_experts_add_nothing(resident_model: Any) -> None:
    resident = resident_model.hybrimoe.session.resident()
    hidden = torch.randn(1, resident_model.config.hidden_size)
    ids, weights = torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.7]])
    one = resident.run(0, hidden, ids[:, :1], weights[:, :1])
    for absent in (-1, resident_model.config.num_experts):
        ids[0, 1] = absent
        assert torch.equal(resident.run(0, hidden, ids, weights), one)


def test_what_is_resident_no_longer_is_when_the_slots_become_fewer(resident_model: Any, plain: Any) -> None:
    ids, new = prompt(), prompt(seed=1)
    mine, theirs = after_prompt(resident_model, ids), after_prompt(plain, ids)
    step(resident_model, new[:, :1], mine)
    step(plain, new[:, :1], theirs)
    session = resident_model.hybrimoe.session
    n_slots = session.n_slots
    session.resize_slots(n_slots - 1)
    assert session.resident() is None
    assert same(step(resident_model, new[:, 1:2], mine), step(plain, new[:, 1:2], theirs))
    session.resize_slots(n_slots)
    for number in range(2, 4):
        found = step(resident_model, new[:, number : number + 1], mine)
        assert same(found, step(plain, new[:, number : number + 1], theirs))
    assert session.resident() is not None


def test_hooks_on_experts_are_called_where_all_have_slots(resident_model: Any) -> None:
    ids, calls = prompt(), []
    handle = resident_model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: calls.append("experts"))
    cache = after_prompt(resident_model, ids)
    calls.clear()
    step(resident_model, ids[:, :1], cache)
    handle.remove()
    assert calls == ["experts"]


@pytest.fixture(scope="module")
def split_model() -> Any:
    """A part of the experts in slots of torch's CPU device, as a card computes them."""
    own = tiny_model("qwen2_moe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybrimoe.runtime.session.open_devices", lambda config: [TorchAccelerator("cpu", fused=False)])
        injection = hybrimoe.inject(
            own, accelerator="emulated", gpu_expert_slots=0.5, expert_dtype="float32", scheduler={"policy": "static"}
        )
    injection.way = capture_step(own, injection.session, HOST, NotedGraphs())
    assert injection.step is not None, injection.way
    return own


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_split_experts_of_several_sequences(split_model: Any, plain: Any, batch: int) -> None:
    ids, new = prompt(batch), prompt(batch, seed=1)[:, :3]
    mine, theirs = after_prompt(split_model, ids), after_prompt(plain, ids)
    split_model.hybrimoe.session.reset_stats()
    for number in range(3):
        assert same(step(split_model, new[:, [number]], mine), step(plain, new[:, [number]], theirs))
    places = split_model.hybrimoe.step._captured[-1].experts
    assert len(places) > 0
    assert all(place.sent is not None for place in places)
    counted = split_model.hybrimoe.stats().by_phase["decode"]
    assert counted.tokens == 3 * batch * len(places)
    assert min(counted.accel_experts, counted.cpu_experts) > 0


def test_absent_experts_of_a_split_call_add_nothing(split_model: Any) -> None:
    session = split_model.hybrimoe.session
    after = after_prompt(split_model, prompt())
    step(split_model, prompt(seed=1)[:, :1], after)
    place = split_model.hybrimoe.step._captured[-1].experts[0]
    call, exchange = place.sent, place.sent.exchange
    weights, outputs = torch.tensor([[0.5, 0.7]]), []
    for ids in ([[1, -1]], [[1, split_model.config.num_experts]], [[-1, 1]]):
        exchange.send(call.hidden, torch.tensor(ids), weights)
        session.announce_step("decode")
        session.run_sent(call)
        outputs.append(call.accelerator.combine_exchanged(exchange))
    assert torch.equal(outputs[0], outputs[1])
    assert outputs[0].any()
    assert not torch.equal(outputs[0], outputs[2])
    exchange.send(call.hidden, torch.tensor([[-1, -1]]), weights)
    session.run_sent(call)
    assert not call.accelerator.combine_exchanged(exchange).any()


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next"])
@pytest.mark.parametrize("error", [GraphError("no graph"), torch.OutOfMemoryError("no memory")])
def test_a_recording_that_fails_later_leaves_the_reply_to_transformers(family: str, error: Exception) -> None:
    plain, model = tiny_model(family), tiny_model(family)
    way, graphs = captured(model)
    assert way.step is not None

    def begin() -> None:
        raise error

    graphs.begin = begin
    ids, new = prompt(), prompt(seed=1)
    mine, theirs = after_prompt(model, ids), after_prompt(plain, ids)
    with pytest.warns(RuntimeWarning, match="no longer captured.*no "):
        found = step(model, new[:, :1], mine)
    assert same(found, step(plain, new[:, :1], theirs))
    assert same(step(model, new[:, 1:2], mine), step(plain, new[:, 1:2], theirs))
    assert way.step.n_steps == 0


@pytest.fixture(scope="module")
def states_model() -> Any:
    own = tiny_model("qwen3_next")
    assert captured(own)[0].step is not None
    return own


def states_of(cache: DynamicCache) -> list[torch.Tensor]:
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    return [state for layer in layers for state in (*layer.conv_states.values(), *layer.recurrent_states.values())]


def test_conversations_with_states_take_turns(states_model: Any) -> None:
    """Of different lengths, one with two sequences; each keeps its graphs, and its states are transformers' own."""
    plain, new = tiny_model("qwen3_next"), prompt(2, seed=1)
    prompts = [prompt(), prompt(seed=2)[:, :3], prompt(2, seed=3)]
    both = [(after_prompt(states_model, ids), after_prompt(plain, ids)) for ids in prompts]
    _, captures = steps_of(states_model)
    for number in range(3):
        for ids, (mine, theirs) in zip(prompts, both, strict=True):
            part = new[: len(ids), [number]]
            assert same(step(states_model, part, mine), step(plain, part, theirs))
    assert steps_of(states_model)[1] == captures + len(prompts)
    for mine, theirs in both:
        for found, expected in zip(states_of(mine), states_of(theirs), strict=True):
            assert same(found, expected)


def test_an_index_grows_with_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by both ways in turn, more tokens than it chooses, in buffers that become too small. With few heads many
    scores are 0, and which of them are chosen is open."""
    monkeypatch.setattr("hybrimoe.step.captured.LEAST_ROOM", ROOM)
    model, plain = (tiny_model("deepseek_v32", index_topk=4, index_n_heads=32) for _ in range(2))
    assert captured(model)[0].step is not None
    ids, new = prompt(2), prompt(2, seed=1)
    mine, theirs = after_prompt(model, ids), after_prompt(plain, ids)
    n_steps, captures = steps_of(model)
    for n_new in (1, 1, 3, 1, 1, 1, 2, 1, 1):
        assert same(step(model, new[:, :n_new], mine), step(plain, new[:, :n_new], theirs))
        for layer, expected in zip(mine.layers, theirs.layers, strict=True):
            assert same(layer.indexer_keys, expected.indexer_keys)
    assert steps_of(model)[0] == n_steps + 7
    assert steps_of(model)[1] > captures + 1
    mine.crop(-4)
    theirs.crop(-4)
    assert same(step(model, new[:, :1], mine), step(plain, new[:, :1], theirs))


@pytest.mark.parametrize(
    ("family", "n_captured"), [("qwen2_moe", 5), ("gpt_oss", 5), ("deepseek_v32", 5), ("qwen3_next", 1)]
)
def test_beams_are_recorded_once(family: str, n_captured: int) -> None:
    """Keys and values are reordered where they lie. States are new ones for each token: once they have moved so early,
    transformers' forward goes on, and recording each token anew, which takes as long as twenty, is not tried."""
    model, plain = tiny_model(family), tiny_model(family)
    assert captured(model)[0].step is not None
    ids, new, chosen = prompt(2), prompt(2, seed=1), torch.tensor([1, 1])
    n_steps, captures = steps_of(model)
    mine, theirs = after_prompt(model, ids), after_prompt(plain, ids)
    for number in range(5):
        assert same(step(model, new[:, [number]], mine), step(plain, new[:, [number]], theirs))
        mine.reorder_cache(chosen)
        theirs.reorder_cache(chosen)
    assert steps_of(model) == (n_steps + n_captured, captures + 1)


def test_states_that_move_later_are_recorded_anew(states_model: Any) -> None:
    plain = tiny_model("qwen3_next")
    ids, new, chosen = prompt(2), prompt(2, seed=1), torch.tensor([1, 0])
    n_steps, captures = steps_of(states_model)
    mine, theirs = after_prompt(states_model, ids), after_prompt(plain, ids)
    for number in range(LEAST_REPLAYS + 2):
        assert same(step(states_model, new[:, [number]], mine), step(plain, new[:, [number]], theirs))
        if number == LEAST_REPLAYS:
            mine.reorder_cache(chosen)
            theirs.reorder_cache(chosen)
    assert steps_of(states_model) == (n_steps + LEAST_REPLAYS + 2, captures + 2)


def test_states_of_inference_mode_are_left_to_transformers_outside_it(states_model: Any) -> None:
    plain, ids, new = tiny_model("qwen3_next"), prompt(), prompt(seed=1)
    n_steps, _ = steps_of(states_model)
    with torch.inference_mode():
        mine, theirs = after_prompt(states_model, ids), after_prompt(plain, ids)
        assert same(step(states_model, new[:, :1], mine), step(plain, new[:, :1], theirs))
    assert steps_of(states_model)[0] == n_steps + 1
    for model, cache in ((states_model, mine), (plain, theirs)):
        with pytest.raises(RuntimeError, match=r"[Ii]nference"):
            step(model, new[:, 1:2], cache)


def test_states_that_a_model_replaces_in_each_step_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step would be right, and all later ones would begin where it began."""
    from transformers.cache_utils import LinearAttentionLayer

    def replaced(layer: Any, states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        layer.recurrent_states[state_idx] = states
        layer.is_recurrent_states_initialized[state_idx] = True
        return states

    monkeypatch.setattr(LinearAttentionLayer, "update_recurrent_state", replaced)
    way, _ = captured(tiny_model("qwen3_next"))
    assert way.step is None
    assert way.reason is not None
    assert "of a state of layer" in way.reason
