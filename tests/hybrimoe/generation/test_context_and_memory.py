"""How long a sequence may be: the model's limit, YaRN's, and that of the memory for keys and values."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from hybrimoe.amounts import Amount
from hybrimoe.errors import BudgetError, PromptError
from hybrimoe.generation import Conversation, PrefixCache, SamplingOptions, TextGenerator
from hybrimoe.generation.context import model_context_tokens
from hybrimoe.generation.kv_memory import estimated_token_bytes, kv_budget_bytes, measured_token_bytes
from hybrimoe.machine.memory import available_bytes, total_bytes

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def small(config_class, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**SMALL | more)).eval()


MODELS = {
    "qwen3": lambda vocab: small(
        Qwen3MoeConfig, vocab_size=vocab, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=16
    ),
    "mixtral": lambda vocab: small(MixtralConfig, vocab_size=vocab, num_local_experts=4),
    "latent attention": lambda vocab: small(
        DeepseekV3Config, vocab_size=vocab, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=8,
        kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1,
    ),
    "sliding windows": lambda vocab: small(
        GptOssConfig, vocab_size=vocab, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "linear attention": lambda vocab: small(
        Qwen3NextConfig, vocab_size=vocab, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request, byte_tokenizer):
    return MODELS[request.param](len(byte_tokenizer))


def run(reply):
    "".join(reply)
    return reply


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (Qwen3MoeConfig(max_position_embeddings=40, rope_parameters=YARN), 128),
        (Qwen3MoeConfig(max_position_embeddings=128, rope_parameters=YARN), 128),
        (Qwen3MoeConfig(max_position_embeddings=32, rope_parameters={"rope_type": "yarn", "factor": 4.0}), 128),
        (Qwen3MoeConfig(max_position_embeddings=64), 64),
        (
            Qwen3MoeConfig(
                max_position_embeddings=131072,
                rope_parameters={
                    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            ),
            131072,
        ),
    ],
)  # fmt: skip
def test_the_context_is_what_the_rope_parameters_reach(config, limit):
    assert model_context_tokens(config) == limit


def test_a_prompt_beyond_the_trained_length_is_answered_as_the_model_does(byte_tokenizer):
    model = small(
        Qwen3MoeConfig, vocab_size=len(byte_tokenizer), moe_intermediate_size=16, num_experts=4, head_dim=16,
        num_experts_per_tok=2, max_position_embeddings=32, rope_parameters=YARN,
    )  # fmt: skip
    generator = TextGenerator(model, byte_tokenizer)
    ids = generator.encode("x" * 60)
    reply = run(generator.reply(ids, SamplingOptions(max_new_tokens=8)))
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, 60:].tolist()
    assert reply.token_ids == expected


def test_what_a_token_takes_is_known_before_and_measured_after(model, byte_tokenizer):
    generator, cache = TextGenerator(model, byte_tokenizer), PrefixCache(model)
    estimated = generator.token_bytes()
    assert estimated == estimated_token_bytes(model) > 0
    run(generator.reply(generator.encode("y" * 100), SamplingOptions(max_new_tokens=2), cache=cache))
    assert measured_token_bytes(cache.growing_layers(), len(cache.token_ids)) == generator.token_bytes() == estimated


def test_a_prompt_that_memory_cannot_hold_is_refused_with_the_context_that_fits(tiny_model, byte_tokenizer):
    token_bytes = TextGenerator(tiny_model, byte_tokenizer).token_bytes()
    generator = TextGenerator(tiny_model, byte_tokenizer, kv_bytes=50 * token_bytes + token_bytes // 2)
    assert generator.context_tokens == 50
    with pytest.raises(PromptError, match=r"holds 50 tokens.*at most 49 tokens, or raise memory\.kv"):
        generator.reply(generator.encode("x" * 50))
    reply = run(generator.reply(generator.encode("x" * 40), SamplingOptions(ignore_eos=True)))
    assert (reply.finish_reason, len(reply.token_ids)) == ("context", 10)
    chat = Conversation(generator)
    turns = [run_turn(chat, "a word", SamplingOptions(max_new_tokens=8)) for _ in range(4)]
    assert turns[-1].n_dropped > 0, "old turns leave room"


def run_turn(chat, text, options):
    turn = chat.send(text, options)
    "".join(turn)
    return turn


def test_without_a_length_a_reply_ends_with_the_text_or_the_context(tiny_model, byte_tokenizer):
    generator = TextGenerator(tiny_model, byte_tokenizer)
    reply = run(generator.reply(generator.encode("It was"), SamplingOptions(ignore_eos=True)))
    assert reply.finish_reason in ("context", "length")
    assert len(reply.prompt_ids) + len(reply.token_ids) == generator.context_tokens


def test_the_budget_is_a_size_a_share_or_half_of_what_is_free(tiny_model):
    assert kv_budget_bytes(tiny_model, Amount("bytes", 10_000_000)) == 10_000_000
    free = available_bytes()
    assert 0.2 * free < kv_budget_bytes(tiny_model, Amount("auto")) < 0.8 * free
    with pytest.raises(BudgetError, match=r"memory\.kv: 7B is 7 bytes"):
        kv_budget_bytes(tiny_model, Amount("bytes", 7))


def control_group(folder: Path, **files: int | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{value}\n")
    return folder


def test_a_control_group_limits_what_is_free(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/service/job\n")
    control_group(root)
    unlimited = available_bytes(root, own)
    control_group(root / "service", memory_max=1_100_000_000, memory_current=400_000_000, memory_stat="inactive_file 7")
    control_group(root / "service" / "job", memory_max="max", memory_current=300_000_000)
    assert available_bytes(root, own) == 700_000_007 < unlimited
    assert total_bytes(root, own) == 1_100_000_000 < total_bytes(root, tmp_path / "none")
    control_group(root / "service" / "job", memory_max=100, memory_current=500)
    assert available_bytes(root, own) == 0
    own.write_text("5:cpu,memory:/old\n")
    old = root / "memory" / "old"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("1000")
    (old / "memory.usage_in_bytes").write_text("400")
    assert available_bytes(root, own) == 600
    assert available_bytes(root, tmp_path / "none") > 1000


@pytest.mark.parametrize("kind", ["sliding windows", "linear attention", "qwen3"])
def test_a_second_turn_computes_only_what_is_new(kind, byte_tokenizer):
    """The next prompt does not repeat the reply as it was generated (templates drop thinking): the states go back to
    where the first prompt ended, and the reply is that of a conversation which starts anew."""
    generator = TextGenerator(MODELS[kind](len(byte_tokenizer)), byte_tokenizer)
    cache, options = PrefixCache(generator.model), SamplingOptions(max_new_tokens=12, ignore_eos=True)
    first = generator.encode("User: a question that is longer than any window.\nAssistant:")
    run(generator.reply(first, options, cache=cache))
    for question in ("another", "a third one"):
        prompt = first + generator.encode(f" ok.\nUser: {question}\nAssistant:")
        kept = run(generator.reply(prompt, options, cache=cache))
        assert kept.n_reused >= len(first) - 8
        assert kept.token_ids == run(generator.reply(prompt, options)).token_ids
        assert cache.token_ids[: len(prompt)] == prompt
        first = prompt
    again = run(generator.reply(first, options, cache=cache))
    assert again.n_reused >= len(first) - 8, "the same prompt once more"
    assert again.token_ids == kept.token_ids


def test_states_go_back_no_further_than_they_can(byte_tokenizer):
    generator = TextGenerator(MODELS["sliding windows"](len(byte_tokenizer)), byte_tokenizer)
    cache, options = PrefixCache(generator.model), SamplingOptions(max_new_tokens=4)
    ids = generator.encode("x" * 60)
    run(generator.reply(ids, options, cache=cache))
    other = run(generator.reply(ids[:30] + generator.encode("y" * 20), options, cache=cache))
    assert other.n_reused == 0
    assert other.token_ids == run(generator.reply(other.prompt_ids, options)).token_ids
