"""Parts of a prompt that pass the layers together: each has the bits that it has alone, and experts are read once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from hybrimoe.checkpoint import load
from hybrimoe.generation import SamplingOptions, TextGenerator, runner
from hybrimoe.generation.continuous_batching import BatchEngine
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.prompts import layer_major
from hybrimoe.generation.prompts.layer_major import group_of, pass_us, rereading_us
from tests.hybrimoe.generation.prefix_replies import Letters

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 128, "max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": 1,
    "num_experts_per_tok": 4,
}  # fmt: skip
N_LAYERS, N_EXPERTS, N_IN_MEMORY = 4, 16, 24
PART = 128
PROMPT = [3 + (7 * n * n + n // 3) % 120 for n in range(5 * PART + 20)]
GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=6, ignore_eos=True)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def on_disk(folder: Path) -> TextGenerator:
    memory = {"host": N_IN_MEMORY, "disk": "auto"}
    return TextGenerator(load(folder, memory=memory, accelerator="none", expert_dtype="int4"), Letters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = OlmoeConfig(**SIZES, num_hidden_layers=N_LAYERS, num_experts=N_EXPERTS, initializer_range=0.05)
    return saved(OlmoeForCausalLM(config), tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def generator(folder: Path) -> Iterator[TextGenerator]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = on_disk(folder)
    yield found
    found.model.hybrimoe.session.close()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of these tests are so small that reading them again would cost less than another call."""
    monkeypatch.setattr(layer_major, "rereading_us", lambda _: math.inf)


def prefilled(generator: TextGenerator, part_us: float | None = None) -> tuple[Any, Any, list[torch.Tensor], int]:
    """Reply, logits, keys and values after the prompt, and the bytes that were read for it."""
    reader = generator.model.hybrimoe.session.store.cache.reader
    before = reader.rate[1]
    reply = generator.reply(PROMPT, GREEDY, part_tokens=PART, part_us=part_us)
    reply.begin()
    logits = None
    while logits is None:
        logits = reply.prefill()
    held = [part.clone() for layer in reply.cache.states.layers for part in (layer.keys, layer.values)]
    return reply, logits.clone(), held, reader.rate[1] - before


def test_parts_have_the_bits_that_they_have_alone_and_experts_are_read_once(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, logits, held, n_read = prefilled(generator)
    monkeypatch.setattr(runner, "group_of", lambda *_: 0)
    _, expected, by_parts, n_by_parts = prefilled(generator)
    assert torch.equal(logits, expected)
    assert all(torch.equal(one, other) for one, other in zip(held, by_parts, strict=True))
    cache = generator.model.hybrimoe.session.store.cache
    assert n_read <= N_LAYERS * N_EXPERTS * cache.slots.slot_bytes
    assert n_by_parts > 2 * n_read


def test_others_get_tokens_between_two_passes(generator: TextGenerator) -> None:
    batch = BatchEngine(generator, parallel=2, part_tokens=PART, part_us=0.0)
    texts = [[9, 8, 7], PROMPT]
    options = SamplingOptions(temperature=0.0, max_new_tokens=60, ignore_eos=True)
    stream = batch.admit(texts[0], options, lambda: False)
    list(batch.step())
    prompt = batch.admit(PROMPT, GREEDY, lambda: False)
    n_parts = len(list(prompt._cut(0)))
    before = len(stream.token_ids)
    while not prompt.token_ids:
        list(batch.step())
    assert len(stream.token_ids) - before >= N_LAYERS * n_parts - 1
    while batch.n_running:
        assert all(progress.error is None for progress in batch.step())
    for reply, text, asked in ((stream, texts[0], options), (prompt, PROMPT, GREEDY)):
        alone = generator.reply(text, asked, part_tokens=PART)
        assert "".join(alone) == reply.text


def test_passes_go_on_for_as_long_as_others_may_wait(generator: TextGenerator) -> None:
    reply = generator.reply(PROMPT, GREEDY, part_tokens=PART, part_us=60e6)
    assert reply.prefill() is not None, "all of them at once, with a minute for it"


def test_a_client_that_goes_between_two_passes_leaves_what_was_there(generator: TextGenerator) -> None:
    gone: list[bool] = []
    cache = PrefixCache(generator.model)
    "".join(generator.reply(PROMPT[:70], GREEDY, cache=cache, part_tokens=PART))
    held = list(cache.token_ids)
    leaving = generator.reply(
        PROMPT, GREEDY, cache=cache, should_stop=lambda: bool(gone), part_tokens=PART, part_us=0.0
    )
    for _ in range(8):
        assert leaving.prefill() is None
    gone.append(True)
    assert leaving.has_ended()
    leaving.end()
    assert cache.token_ids == held[:70]
    assert {layer.get_seq_length() for layer in cache.states.layers} == {70}
    again = generator.reply(PROMPT, GREEDY, cache=cache, part_tokens=PART)
    "".join(again)
    assert again.n_reused == 70


def test_a_pass_that_fails_ends_its_reply_only(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "".join(generator.reply(PROMPT, GREEDY, part_tokens=PART))
    layer = generator.model.get_decoder().layers[2]
    own, n_calls = layer.forward, iter(range(9))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(n_calls) == 3:
            raise ValueError("a layer fails")
        return own(*args, **kwargs)

    cache = PrefixCache(generator.model)
    reply = generator.reply(PROMPT, GREEDY, cache=cache, part_tokens=PART)
    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", failing)
        with pytest.raises(ValueError, match="a layer fails"):
            reply.prefill()
        assert layer.forward is failing, "what stood there before the passes"
    assert not cache.token_ids
    assert {held.get_seq_length() for held in cache.states.layers} == {0}
    assert "".join(generator.reply(PROMPT, GREEDY, cache=cache, part_tokens=PART)) == expected


def test_the_last_part_is_no_short_one(generator: TextGenerator) -> None:
    reply = generator.reply(PROMPT, GREEDY, part_tokens=PART)
    sizes = [end - start for start, end in reply._cut(0)]
    assert sizes == [PART, PART, PART, PART, 74, 74]


def test_parts_that_may_be_a_compiled_step_go_alone(generator: TextGenerator) -> None:
    cache = PrefixCache(generator.model)
    cache.reuse(PROMPT)
    assert group_of(generator.model, cache, [[5] * 80, [5] * 80, [5] * 64]) == 2
    assert group_of(generator.model, cache, [[5] * 80, [5] * 64]) == 0
    assert group_of(generator.model, cache, [[5] * 80]) == 0
    assert group_of(generator.model, cache, []) == 0


def test_experts_in_memory_and_windows_go_part_by_part(folder: Path, tmp_path: Path, generator: TextGenerator) -> None:
    in_memory = load(folder, accelerator="none", expert_dtype="int4", packed_file=False)
    cache = PrefixCache(in_memory)
    cache.reuse(PROMPT)
    assert group_of(in_memory, cache, [[5] * 80, [5] * 80]) == 0
    config = GptOssConfig(
        **SIZES, num_hidden_layers=2, num_local_experts=N_EXPERTS, head_dim=16, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    windows = on_disk(saved(GptOssForCausalLM(config), tmp_path / "gpt_oss"))
    cache = PrefixCache(windows.model)
    cache.reuse(PROMPT)
    assert group_of(windows.model, cache, [[5] * 80, [5] * 80]) == 0
    windows.model.hybrimoe.session.close()


def test_parts_go_alone_where_the_disk_is_faster_than_another_call(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = generator.model, PrefixCache(generator.model)
    cache.reuse(PROMPT)
    parts = [[5] * 80, [5] * 80]
    call_us = pass_us(model, cache, 80)
    assert call_us is not None
    for factor, n_together in ((1e-3, 0), (1e3, 2)):
        monkeypatch.setattr(layer_major, "rereading_us", lambda _, us=factor * call_us: us)
        assert group_of(model, cache, parts) == n_together


def test_rereading_takes_as_long_as_the_disk_has_taken_for_as_many_bytes(generator: TextGenerator) -> None:
    "".join(generator.reply(PROMPT[:70], GREEDY))
    cache = generator.model.hybrimoe.session.store.cache
    busy_us, n_bytes = cache.reader.rate
    n_absent = N_LAYERS * N_EXPERTS - cache.slots.n_slots
    assert n_absent > 0
    assert rereading_us(generator.model) == pytest.approx(
        n_absent / N_LAYERS * cache.slots.slot_bytes * busy_us / n_bytes
    )


@pytest.mark.parametrize("kind", ["stream", "argument"])
def test_a_model_whose_layers_hand_on_more_than_hidden_states(generator: TextGenerator, kind: str) -> None:
    model, cache = generator.model, PrefixCache(generator.model)
    cache.reuse(PROMPT)
    assert pass_us(model, cache, 80) is not None

    def other(module: Any, args: Any, kwargs: Any) -> Any:
        if kind == "stream":
            return (2 * args[0], *args[1:]), kwargs
        return args, kwargs | {"seen": []}

    hook = model.get_decoder().layers[1].register_forward_pre_hook(other, with_kwargs=True)
    assert pass_us(model, cache, 80) is None
    hook.remove()
    assert pass_us(model, cache, 80) is not None
