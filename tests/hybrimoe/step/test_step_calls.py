"""What the compiled step serves and what it leaves to transformers, on one tiny model; the two ways alternate."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hybrimoe
from cpu_kernels.step import compiled
from cpu_kernels.step.program import MAX_LOGITS, MAX_ROWS
from hybrimoe.generation.stored import new_cache
from hybrimoe.step import build

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import prompt, tiny_model

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_model("qwen2_moe")


@pytest.fixture(scope="module")
def model() -> Any:
    own = tiny_model("qwen2_moe")
    hybrimoe.inject(own, accelerator="none", expert_dtype="float32")
    assert own.hybrimoe.step is not None
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


def served(model: Any) -> int:
    return int(model.hybrimoe.step.n_steps)


def test_a_model_is_read_on_one_thread_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    for name in ("record", "read_model"):
        own = getattr(build, name)
        monkeypatch.setattr(build, name, lambda *given, own=own: (seen.append(torch.get_num_threads()), own(*given))[1])
    torch.set_num_threads(2)
    try:
        hybrimoe.inject(tiny_model("qwen2_moe"), accelerator="none", expert_dtype="float32")
        assert (seen, torch.get_num_threads()) == ([1, 1], 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("batch", "n_new"), [(1, 1), (1, 5), (3, 1), (4, 4), (1, MAX_LOGITS)])
def test_rows_of_several_sequences_and_tokens(model: Any, plain: Any, batch: int, n_new: int) -> None:
    ids, new = prompt(batch), prompt(batch, seed=1).repeat(1, 2)[:, :n_new]
    before = served(model)
    found = step(model, new, after_prompt(model, ids))
    expected = step(plain, new, after_prompt(plain, ids))
    assert served(model) == before + 1
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= TOLERANCE


def test_more_rows_than_a_step_has_are_left_to_the_model(model: Any) -> None:
    cache = after_prompt(model, prompt(1))
    before = served(model)
    step(model, prompt(1).repeat(1, 9)[:, : MAX_ROWS + 1], cache, logits_to_keep=1)
    assert served(model) == before


def test_more_logits_than_a_step_has_are_left_to_the_model(model: Any) -> None:
    before = served(model)
    step(model, prompt(1).repeat(1, 9)[:, : MAX_LOGITS + 1], after_prompt(model, prompt(1)))
    step(model, prompt(3).repeat(1, 9)[:, : MAX_LOGITS // 2], after_prompt(model, prompt(3)), logits_to_keep=1)
    assert served(model) == before


@pytest.mark.parametrize("n_new", [MAX_LOGITS + 1, MAX_ROWS - 1, MAX_ROWS])
def test_a_short_prompt_is_a_step(model: Any, plain: Any, n_new: int) -> None:
    """Its last logits have the bits that they have token by token, and the model's values."""
    ids, new = prompt(1), prompt(1, seed=1).repeat(1, 9)[:, :n_new]
    whole, pieces = after_prompt(model, ids), after_prompt(model, ids)
    before = served(model)
    found = step(model, new, whole, logits_to_keep=1)
    assert served(model) == before + 1
    for token in new[0]:
        alone = step(model, token.view(1, 1), pieces)
    assert torch.equal(found, alone)
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    expected = step(plain, new, after_prompt(plain, ids), logits_to_keep=1)
    assert float((found - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize(("family", "kv_dtype"), [("qwen2_moe", "auto"), ("qwen2_moe", "int8"), ("gpt_oss", "auto")])
@pytest.mark.parametrize("n_new", [1, MAX_ROWS])
def test_a_first_prompt_is_a_step(family: str, kv_dtype: str, n_new: int) -> None:
    """On a cache that holds nothing yet: plain layers, stored ones and windows. It has the bits that its tokens have
    one by one and the model's values, and the model goes on from the cache."""
    plain, model = tiny_model(family), tiny_model(family)
    config = {"memory": {"kv_dtype": kv_dtype}}
    hybrimoe.inject(model, accelerator="none", expert_dtype="float32", config=config)
    ids = prompt(1, seed=1).repeat(1, 9)[:, :n_new]
    whole, pieces, tolerance = new_cache(model), new_cache(model), TOLERANCE if kv_dtype == "auto" else 0.1
    before = served(model)
    found = model.hybrimoe.step.next_logits(ids[0].tolist(), whole)
    assert served(model) == before + 1
    for token in ids[0].tolist():
        alone = model.hybrimoe.step.next_logits([token], pieces)
    assert torch.equal(found, alone)
    own = DynamicCache(config=plain.config)
    assert float((found - step(plain, ids, own, logits_to_keep=1)[:, -1]).abs().max()) <= tolerance
    new = prompt(1).repeat(1, 9)[:, : MAX_ROWS + 1]
    expected = step(plain, new, own, logits_to_keep=1)
    assert float((step(model, new, whole, logits_to_keep=1) - expected).abs().max()) <= tolerance
    assert served(model) == before + 1 + n_new


def test_a_first_prompt_stays_with_a_model_that_remembers_images(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.hybrimoe.step, "_in_a_plane", [model])
    assert model.hybrimoe.step.next_logits([3, 4], new_cache(model)) is None


@pytest.mark.parametrize("cache", [None, DynamicCache()])
def test_what_is_no_cache_of_the_model_is_left_to_it(model: Any, cache: Any) -> None:
    assert model.hybrimoe.step.next_logits([3, 4], cache) is None


def test_a_short_prompt_over_a_long_cache_takes_several_steps(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as keep what attention writes within its room, and the result is the same."""
    ids, new = prompt(1), prompt(1, seed=1).repeat(1, 9)[0, :MAX_ROWS].tolist()
    whole = model.hybrimoe.step.next_logits(new, after_prompt(model, ids))
    before = served(model)
    monkeypatch.setattr(compiled, "ROOM_BYTES", 0)
    parts = model.hybrimoe.step.next_logits(new, after_prompt(model, ids))
    assert served(model) == before + MAX_ROWS // MAX_LOGITS
    assert torch.equal(whole, parts)


def test_the_last_logits_only(model: Any) -> None:
    ids, new = prompt(2), prompt(2, seed=1)[:, :3]
    cache = after_prompt(model, ids)
    whole = step(model, new, copy.deepcopy(cache))
    last = step(model, new, cache, logits_to_keep=1)
    assert torch.equal(whole[:, -1:], last)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_both_sides(model: Any, plain: Any, side: str) -> None:
    ids = prompt(2)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    new, new_mask = prompt(2, seed=1)[:, :1], torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    results = []
    for one in (model, plain):
        cache = after_prompt(one, ids, attention_mask=mask, position_ids=positions)
        results.append(step(one, new, cache, attention_mask=new_mask, position_ids=positions[:, -1:] + 1))
    assert float((results[0] - results[1]).abs().max()) <= TOLERANCE


def test_the_two_ways_alternate_on_one_cache(model: Any, plain: Any) -> None:
    ids = prompt(1)
    ours, theirs = after_prompt(model, ids), after_prompt(plain, ids)
    before = served(model)
    for number in range(6):
        token = torch.tensor([[3 + number]])
        extra = {"output_router_logits": True} if number % 2 else {}
        found, expected = step(model, token, ours, **extra), step(plain, token, theirs)
        assert float((found - expected).abs().max()) <= TOLERANCE
    assert served(model) == before + 3
    for ours_layer, their_layer in zip(ours.layers, theirs.layers, strict=True):
        assert torch.allclose(ours_layer.keys, their_layer.keys, atol=1e-5)
        assert torch.allclose(ours_layer.values, their_layer.values, atol=1e-5)


def test_a_cache_is_cropped_between_steps(model: Any, plain: Any) -> None:
    ids = prompt(1)
    ours, theirs = after_prompt(model, ids), after_prompt(plain, ids)
    for one, cache in ((model, ours), (plain, theirs)):
        step(one, torch.tensor([[5, 6, 7]]), cache)
        cache.crop(-2)
    found, expected = step(model, torch.tensor([[9]]), ours), step(plain, torch.tensor([[9]]), theirs)
    assert float((found - expected).abs().max()) <= TOLERANCE


def test_several_tokens_at_once_have_the_bits_of_one_by_one(model: Any) -> None:
    ids, tokens = prompt(1), [11, 12, 13, 14]
    cache = after_prompt(model, ids)  # one for both: torch does not give the same bits each time
    together = step(model, torch.tensor([tokens]), copy.deepcopy(cache))
    single = torch.cat([step(model, torch.tensor([[token]]), cache) for token in tokens], 1)
    assert torch.equal(together, single)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "output_router_logits", "labels"])
def test_what_else_is_asked_for_comes_from_the_model(model: Any, asked: str) -> None:
    cache, before = after_prompt(model, prompt(1)), served(model)
    extra: Any = torch.tensor([[4]]) if asked == "labels" else True
    step(model, torch.tensor([[4]]), cache, **{asked: extra})
    assert served(model) == before


def test_watched_modules_are_called(model: Any) -> None:
    cache, seen = after_prompt(model, prompt(1)), []
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    step(model, torch.tensor([[4]]), cache)
    handle.remove()
    assert seen == [1]


def test_tokens_outside_the_vocabulary_are_refused(model: Any) -> None:
    cache = after_prompt(model, prompt(1))
    with pytest.raises(IndexError, match="token ids must be below"):
        step(model, torch.tensor([[10_000]]), cache)


@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "beams", "prompt lookup", "processors"],
)
def test_generate_gives_the_same_tokens(model: Any, plain: Any, strategy: dict[str, Any]) -> None:
    options = {"max_new_tokens": 12, "pad_token_id": 0, **strategy}
    found, expected = model.generate(prompt(1), **options), plain.generate(prompt(1), **options)
    assert torch.equal(found, expected)


def test_two_models_in_a_process(plain: Any) -> None:
    models = [tiny_model("olmoe", seed) for seed in (1, 2)]
    expected = [one.generate(prompt(1), max_new_tokens=6, do_sample=False, pad_token_id=0) for one in models]
    for one in models:
        hybrimoe.inject(one, accelerator="none", expert_dtype="float32")
    for _ in range(2):
        for one, tokens in zip(models, expected, strict=True):
            assert torch.equal(one.generate(prompt(1), max_new_tokens=6, do_sample=False, pad_token_id=0), tokens)


def test_the_deployment_may_keep_transformers() -> None:
    own = tiny_model("olmoe")
    injection = hybrimoe.inject(own, accelerator="none", step="transformers")
    assert injection.step is None
    assert injection.explain().ways == {"model": "transformers: cpu.step: transformers"}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_do_not_depend_on_the_threads(threads: int) -> None:
    own = tiny_model("qwen2_moe")
    hybrimoe.inject(own, accelerator="none", expert_dtype="int4", threads=threads, dense_dtype="int8")
    assert own.hybrimoe.step is not None, own.hybrimoe.way
    cache = BITS.setdefault("cache", after_prompt(own, prompt(1)))
    found = step(own, prompt(1, seed=2)[:, :3], copy.deepcopy(cache))
    known = BITS.setdefault("logits", found)
    assert torch.equal(found, known)


BITS: dict[str, Any] = {}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_packed_weights_are_within_the_kernels_tolerance(dtype: str) -> None:
    ways = []
    for way in ("auto", "transformers"):
        own = tiny_model("qwen3_moe")
        hybrimoe.inject(own, accelerator="none", expert_dtype=dtype, dense_dtype=dtype, step=way)
        assert (own.hybrimoe.step is not None) == (way == "auto"), own.hybrimoe.way
        ways.append(step(own, prompt(1, seed=3)[:, :4], after_prompt(own, prompt(1))))
    assert float((ways[0] - ways[1]).abs().max()) <= 2e-2 * float(ways[1].abs().max()) * 3


def test_a_copy_of_the_model_has_a_step_of_its_own() -> None:
    own = tiny_model("olmoe")
    expected = own.generate(prompt(1), max_new_tokens=6, do_sample=False, pad_token_id=0)
    hybrimoe.inject(own, accelerator="none", expert_dtype="float32")
    twin = copy.deepcopy(own)
    assert twin.hybrimoe.step is None
    assert torch.equal(twin.generate(prompt(1), max_new_tokens=6, do_sample=False, pad_token_id=0), expected)
    twin.hybrimoe.compile_step()
    assert twin.hybrimoe.step is not None
    assert twin.hybrimoe.step is not own.hybrimoe.step
    assert torch.equal(twin.generate(prompt(1), max_new_tokens=6, do_sample=False, pad_token_id=0), expected)
    assert own.hybrimoe.step.n_steps == 0
    twin.hybrimoe.restore()
    assert "forward" not in vars(twin)
    assert torch.equal(own.generate(prompt(1), max_new_tokens=6, do_sample=False, pad_token_id=0), expected)


@pytest.mark.parametrize("room", [4, 256])
def test_sliding_windows_that_fill_and_move(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrimoe.generation.growing.LEAST_ROOM", room)
    own, other = tiny_model("gpt_oss"), tiny_model("gpt_oss")
    hybrimoe.inject(own, accelerator="none", expert_dtype="float32")
    assert own.hybrimoe.step is not None, own.hybrimoe.way
    ours, theirs = after_prompt(own, prompt(1)), after_prompt(other, prompt(1))
    for number in range(40):  # the window is 16 tokens
        new = torch.tensor([[3 + number, 4 + number]])
        found, expected = step(own, new, ours), step(other, new, theirs)
        assert float((found - expected).abs().max()) <= TOLERANCE, number
        if number % 7 == 6:  # transformers' way in between
            token = torch.tensor([[5]])
            step(own, token, ours, output_router_logits=True)
            step(other, token, theirs)
    assert own.hybrimoe.step.n_steps == 40


def test_tokens_that_stand_in_a_plane_stay_with_the_model() -> None:
    own = tiny_model("qwen3_vl_moe")
    hybrimoe.inject(own, accelerator="none", expert_dtype="float32")
    assert own.hybrimoe.step is not None, own.hybrimoe.way
    cache = after_prompt(own, prompt(1))
    token, n_past = torch.tensor([[7]]), cache.get_seq_length()
    in_text = torch.full((3, 1, 1), n_past + 5)
    in_a_plane = torch.tensor([n_past, n_past + 1, n_past + 2]).view(3, 1, 1)
    found = step(own, token, cache, position_ids=in_text)
    assert own.hybrimoe.step.n_steps == 1
    cache.crop(-1)
    with torch.no_grad():
        torch.testing.assert_close(found, type(own).forward(own, token, past_key_values=cache,
                                                            position_ids=in_text).logits)  # fmt: skip
    cache.crop(-1)
    step(own, token, cache, position_ids=in_a_plane)
    assert own.hybrimoe.step.n_steps == 1, "no table of angles has these"
    own.model.rope_deltas = torch.tensor([[3]])
    cache.crop(-1)
    step(own, token, cache)
    assert own.hybrimoe.step.n_steps == 1, "the model itself adds what it remembers of images"


def test_threads_that_call_a_mixed_model_at_once_do_not_disturb_each_other() -> None:
    own = tiny_model("jamba")
    hybrimoe.inject(own, accelerator="none", expert_dtype="float32")
    assert own.hybrimoe.step.reading.model is None
    alone = [own.generate(prompt(1, seed), max_new_tokens=8, do_sample=False, pad_token_id=0) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(
            pool.map(
                lambda seed: own.generate(prompt(1, seed), max_new_tokens=8, do_sample=False, pad_token_id=0), range(3)
            )
        )
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_latent_attention_of_a_bfloat16_model() -> None:
    own, other = tiny_model("deepseek_v3").bfloat16(), tiny_model("deepseek_v3").bfloat16()
    hybrimoe.inject(own, accelerator="none", expert_dtype="bfloat16")
    assert own.hybrimoe.step is not None, own.hybrimoe.way
    found, expected = (step(one, prompt(1, seed=3)[:, :4], after_prompt(one, prompt(1))) for one in (own, other))
    assert served(own) == 1
    assert float((found - expected).abs().max()) <= 6e-2 * float(expected.abs().max())
