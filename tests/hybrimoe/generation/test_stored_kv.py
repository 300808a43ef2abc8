"""Keys and values stored in another dtype than the model's: every family's attention, and all that moves them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hybrimoe
from cpu_kernels.step.states.stored import StoredStates
from hybrimoe.dense import attention
from hybrimoe.errors import ConfigError
from hybrimoe.generation import Conversation, SamplingOptions, TextGenerator
from hybrimoe.generation.continuous_batching import BatchEngine
from hybrimoe.generation.growing import GrowingLayer, growing_cache
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.kv_memory import estimated_token_bytes, measured_token_bytes
from hybrimoe.generation.prefix.blocks import PrefixTree
from hybrimoe.generation.saved.sessions import Session
from hybrimoe.generation.stored import ROW_DTYPES, StoredLayer, new_cache
from hybrimoe.step.step import Step

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import tiny_model as tiny_family

FAMILIES = ("qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3", "llama4")
"""Grouped heads; windows and sinks; partial rotation; latent attention; chunks."""
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 3e-2, "int4": 0.4}
"""Relative error of the logits of tiny random models, whose attention is most of what they add."""
TEXT = [7 * i % 53 + 3 for i in range(150)]


def stored(model: Any, name: str | None) -> DynamicCache:
    """An empty cache with the rows of a dtype; None: as the model computes them."""
    cache = growing_cache(model.config.get_text_config(decoder=True))
    if name is not None:
        cache.layers = [StoredLayer(name) if type(layer) is GrowingLayer else layer for layer in cache.layers]
    return cache


def logits_after(model: Any, step: Step, name: str | None) -> torch.Tensor:
    """Logits of steps of one, three and one token behind a prompt in two parts."""
    cache, found = stored(model, name), []
    with torch.inference_mode():
        for part in (TEXT[:70], TEXT[70:90]):
            model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
    for tokens in ([5], [6, 7, 8], [9]):
        logits = step.next_logits(tokens, cache)
        assert logits is not None
        found.append(logits[-1])
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_attention_reads_every_dtype(family: str) -> None:
    model = tiny_family(family)
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    assert isinstance(injection.step, Step), injection.way
    exact = logits_after(model, injection.step, None)
    twins = [Step(model, injection.session, injection.step.reading, threads) for threads in (2, 3)]
    for name, tolerance in TOLERANCES.items():
        found = logits_after(model, injection.step, name)
        assert float((found - exact).norm() / exact.norm()) <= tolerance, name
        assert all(torch.equal(found, logits_after(model, twin, name)) for twin in twins), name
    injection.restore()


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_a_prompt_reads_stored_rows_by_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second part of a prompt makes no floats of all that is stored, and gives the logits that it gave with them."""
    model = tiny_family(family)
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")

    def last_logits(name: str | None) -> torch.Tensor:
        cache = stored(model, name)
        with torch.inference_mode():
            for part in (TEXT[:70], TEXT[70:]):
                found = model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True).logits
        return found

    with monkeypatch.context() as patched:
        patched.setattr(attention, "supports_prompt_attention", lambda *_: False)
        expected = {name: last_logits(name) for name in (None, "float32", "int8", "int4")}
    monkeypatch.delattr(StoredStates, "floats")
    for name, wanted in expected.items():
        assert float((last_logits(name) - wanted).norm() / wanted.norm()) <= 1e-4, name
    injection.restore()


def test_a_prompt_with_padding_is_left_to_torch() -> None:
    model = tiny_family("qwen3_moe")
    plain = tiny_family("qwen3_moe")
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    ids = torch.tensor([TEXT[:40], TEXT[40:80]])
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    found = []
    with torch.inference_mode():
        for one in (model, plain):
            cache = stored(one, None)
            for stop in (20, 40):
                places = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, stop - 20 :]
                output = one(
                    input_ids=ids[:, stop - 20 : stop], attention_mask=mask[:, :stop], position_ids=places,
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
            found.append(output.logits)
    assert torch.allclose(found[0], found[1], atol=1e-4)
    injection.restore()


@pytest.fixture(scope="module", params=["int8", "int4"])
def generator(request: pytest.FixtureRequest, tiny_model: Any, byte_tokenizer: Any) -> Any:
    """A generator of the tiny model with keys and values stored in a dtype."""
    model = copy.deepcopy(tiny_model)
    hybrimoe.inject(model, accelerator="none", expert_dtype="float32", kv_dtype=request.param)
    return TextGenerator(model, byte_tokenizer)


PROMPT = list(b"once upon a time there was once upon a time there was once upon a time there was ")
GREEDY = SamplingOptions(temperature=0, max_new_tokens=16)


def replied(generator: TextGenerator, prompt: list[int], cache: PrefixCache | None = None) -> list[int]:
    reply = generator.reply(prompt, GREEDY, cache=cache)
    "".join(reply)
    return reply.token_ids


def test_what_moves_tokens_moves_rows(generator: TextGenerator) -> None:
    """A conversation that goes on, goes back, is saved and restored, or begins as another one: the same replies."""
    model = generator.model
    own = PrefixCache(model)
    first = replied(generator, PROMPT, own)
    dtype = ROW_DTYPES[model.hybrimoe.config.memory.kv_dtype]
    assert {layer.keys.dtype for layer in own.growing_layers()} == {dtype}
    assert replied(generator, PROMPT, own) == first  # goes back
    held = own.keys_and_values()
    assert held is not None
    restored = PrefixCache(model)
    assert restored.take_up(own.token_ids, held)
    again = restored.keys_and_values()
    assert again is not None
    assert all(
        torch.equal(a, b) for one, other in zip(held, again, strict=True) for a, b in zip(one, other, strict=True)
    )
    second = [*own.token_ids, *b" and then "]
    expected = replied(generator, second, own)
    assert replied(generator, second, restored) == expected
    tree = PrefixTree(model, 1 << 20)
    writer = PrefixCache(model, tree)
    replied(generator, PROMPT, writer)
    reader = PrefixCache(model, tree)
    assert reader.reuse(second) >= 64
    assert all(
        torch.equal(a.keys[..., :64, :], b.keys[..., :64, :])
        for a, b in zip(reader.growing_layers(), writer.growing_layers(), strict=True)
    )


def test_a_saved_session_belongs_to_its_dtype(
    generator: TextGenerator, tiny_model: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    """It goes on as if it had not paused; states of another dtype are not taken up, and computed from the text."""
    conversation = Conversation(generator)
    "".join(conversation.send("once upon a time", GREEDY))
    session = Session(tmp_path, "one", "this model")
    session.save_text(conversation)
    session.save_states(conversation)
    second = conversation.send("and then", GREEDY)
    expected = "".join(second), second.reply.n_reused
    restored = Conversation(generator)
    assert session.restore(restored) is None
    again = restored.send("and then", GREEDY)
    assert ("".join(again), again.reply.n_reused) == expected
    other = Conversation(TextGenerator(tiny_model, byte_tokenizer))
    assert session.restore(other) == "the model keeps other states now"
    assert other.cache.token_ids == []
    assert [message["content"] for message in other.messages] == [m["content"] for m in conversation.messages[:2]]


def test_side_by_side_and_with_drafts(generator: TextGenerator) -> None:
    """Replies of a batch, and drafts that are taken back, are the replies alone."""
    prompts = [PROMPT, PROMPT[::-1]]
    alone = [replied(generator, prompt) for prompt in prompts]
    engine = BatchEngine(generator, parallel=2)
    replies = [engine.admit(prompt, GREEDY, lambda: False) for prompt in prompts]
    while engine.n_running:
        list(engine.step())
    assert [reply.token_ids for reply in replies] == alone
    drafting = TextGenerator(generator.model, generator.tokenizer, speculate=True)
    assert replied(drafting, PROMPT) == alone[0]


def test_the_memory_of_a_token_is_told_as_it_is(generator: TextGenerator) -> None:
    cache = PrefixCache(generator.model)
    replied(generator, PROMPT, cache)
    told = measured_token_bytes(cache.growing_layers(), len(cache.token_ids))
    assert told == estimated_token_bytes(generator.model)
    a_row = {"int8": 16 + 4, "int4": 16 // 2 + 2}[generator.model.hybrimoe.config.memory.kv_dtype]
    assert told == 4 * a_row + 4 * a_row // 8  # keys and values of two layers, with room to grow
    assert any(f", {4 * a_row} bytes a token" in remark for remark in generator.model.hybrimoe.remarks)


def test_padded_batches(generator: TextGenerator) -> None:
    from hybrimoe.generation.batch.generate import BatchPrompt, generate_batch

    prompts = [BatchPrompt(tuple(PROMPT)), BatchPrompt(tuple(PROMPT[:40]))]
    replies = generate_batch(generator, prompts, GREEDY, lambda: False)
    assert [len(reply.token_ids) for reply in replies] == [16, 16]


def test_a_dtype_that_a_model_cannot_have_is_refused(tiny_model: Any) -> None:
    model = copy.deepcopy(tiny_model)
    said = r"memory\.kv_dtype: int8: it needs attention that is compiled.*layer 0 has transformers: cpu\.step"
    with pytest.raises(ConfigError, match=said):
        hybrimoe.inject(model, accelerator="none", expert_dtype="float32", kv_dtype="int8", step="transformers")
    assert not hasattr(model, "hybrimoe")
    with pytest.raises(ConfigError, match=r"memory\.kv_dtype"):
        hybrimoe.load_config({"memory": {"kv_dtype": "fp8"}})


def test_the_models_own_dtype_is_no_conversion(tiny_model: Any) -> None:
    model = copy.deepcopy(tiny_model)
    hybrimoe.inject(model, accelerator="none", expert_dtype="float32", kv_dtype="float32")
    assert {type(layer) for layer in new_cache(model).layers} == {GrowingLayer}
