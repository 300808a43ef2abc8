"""From a checkpoint to 20 greedy tokens on fake cards: the CPU's tokens, and nothing that a real card would punish."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hybrimoe
from hybrimoe.errors import ModelError
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.generation.drawing.candidates import few_candidates
from hybrimoe.generation.sampling import Sampler
from hybrimoe.runtime.layer_call.stats import SessionStats
from tests.fake_device import DEVICE_TYPE, fake_cards

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import tiny_model as tiny_family

PROMPT = list(b"It was a bright morning, and she had been so long in the world")
N_TOKENS, N_LAYERS = 20, 4
MANY_TOKENS = 40
"""Where calls are counted, and the first ones do more."""
ONE, TWO = f"{DEVICE_TYPE}:0", [f"{DEVICE_TYPE}:0", f"{DEVICE_TYPE}:1"]
LEARNING = 30
"""Waits of the first calls: the lookahead reads the routers' weights, kernels are compared with torch."""
FIRST_USE = 120
"""Launches of torch's way, with which fused kernels are compared when they are first used."""
WEIGHTS = {"float32": (0, 0.3), "bfloat16": (75, 0.2)}
"""Seed and spread of the weights. In bfloat16 each way to compute rounds otherwise, and CPUs differ: this model's first
choice leads the second, in each of the 20 tokens, by 4.9 times what its logits are away from those in float32."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Callable[[Path], Path]) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path / "cache")))


def save_model(folder: Path, dtype: str) -> Path:
    """A small Qwen3-MoE of 4 layers with 8 experts each."""
    seed, spread = WEIGHTS[dtype]
    config = Qwen3MoeConfig(
        vocab_size=258, hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=N_LAYERS,
        num_experts=8, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=None, initializer_range=spread,
    )  # fmt: skip
    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def greedy(
    directory: Path, tokenizer: PreTrainedTokenizerFast, prepare: Callable[[Any], None] = lambda model: None,
    *, n_tokens: int = N_TOKENS, **options: Any,
) -> tuple[list[int], SessionStats]:  # fmt: skip
    """`n_tokens` after the prompt, and the session's statistics. `prepare` may change the loaded model."""
    settings: dict[str, Any] = {"progress": False, "expert_dtype": "float32", "backend": "torch"}
    model = hybrimoe.load(directory, **settings | options)
    prepare(model)
    try:
        reply = TextGenerator(model, tokenizer, prefill_chunk_tokens=40).reply(
            PROMPT, SamplingOptions(temperature=0.0, max_new_tokens=n_tokens)
        )
        for _ in reply:
            pass
        return reply.token_ids, model.hybrimoe.stats()
    finally:
        model.hybrimoe.session.close()


@pytest.fixture(scope="module")
def tokens_of_the_cpu(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], list[int]]:
    """What the model in a dtype says without a card."""

    @functools.cache
    def compute(dtype: str) -> list[int]:
        return greedy(save_model(tmp_path_factory.mktemp(dtype), dtype), byte_tokenizer, accelerator="none")[0]

    return compute


@pytest.mark.parametrize(
    ("accelerator", "dtype", "policy"),
    [
        ("auto", "float32", "hybrimoe"),
        (ONE, "bfloat16", "on_demand/impact/lru"),
        (TWO, "float32", "on_demand/impact/lru"),
        (TWO, "bfloat16", "hybrimoe"),
    ],
)
def test_tokens_are_those_of_the_cpu(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, tokens_of_the_cpu: Callable[[str], list[int]],
    accelerator: str | list[str], dtype: str, policy: str,
) -> None:  # fmt: skip
    directory, expected = save_model(tmp_path / "model", dtype), tokens_of_the_cpu(dtype)
    with fake_cards(2) as cards:
        found, stats = greedy(directory, byte_tokenizer, accelerator=accelerator, policy=policy, gpu_expert_slots=12)
    assert found == expected
    assert len(found) == N_TOKENS
    assert stats.total.accel_experts > 0
    assert cards.counts["launches"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no torch accelerator here")
@pytest.mark.parametrize("step", ["auto", "transformers"])
@pytest.mark.parametrize("policy", ["hybrimoe", "on_demand/impact/lru"])
def test_tokens_of_a_real_card_are_those_of_the_cpu(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, tokens_of_the_cpu: Callable[[str], list[int]],
    policy: str, step: str,
) -> None:  # fmt: skip
    captured: list[Any] = []

    def prepare(model: Any) -> None:
        assert (model.hybrimoe.step is not None) == (step == "auto"), model.hybrimoe.way
        if model.hybrimoe.step is not None:
            captured.append(model.hybrimoe.step)

    directory, expected = save_model(tmp_path / "model", "float32"), tokens_of_the_cpu("float32")
    found, stats = greedy(
        directory, byte_tokenizer, prepare, accelerator="auto", policy=policy, gpu_expert_slots=12, step=step
    )
    assert found == expected
    assert stats.total.accel_experts > 0
    assert [each.n_steps for each in captured] == ([N_TOKENS - 1] if step == "auto" else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no torch accelerator here")
@pytest.mark.parametrize(
    "family", ["qwen3_next", "kimi_linear", "nemotron_h", "lfm2_moe", "inkling", "deepseek_v32", "longcat_flash"]
)
def test_other_caches_are_part_of_a_real_cards_graphs(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    """As on the fake ones (`test_exchanged_steps.py`)."""
    steps: list[Any] = []
    directory = tmp_path / family
    tiny_family(family, vocab_size=258).save_pretrained(directory)
    expected, _ = greedy(directory, byte_tokenizer, accelerator="none")
    found, _ = greedy(
        directory, byte_tokenizer, lambda model: steps.append(model.hybrimoe.step), accelerator="auto",
        gpu_expert_slots=6,
    )  # fmt: skip
    assert found == expected
    assert [None if step is None else step.n_steps for step in steps] == [N_TOKENS - 1]


def test_a_model_that_leaves_its_inputs_where_they_are(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """transformers before 5.15, and models that prepare their inputs themselves, move no token ids to the weights."""

    def prepare(model: Any) -> None:
        model.prepare_inputs_for_generation = lambda ids, is_first_iteration, **more: {"input_ids": ids, **more}

    directory = save_model(tmp_path / "model", "float32")
    expected, _ = greedy(directory, byte_tokenizer, prepare, accelerator="none")
    with fake_cards(1):
        found, _ = greedy(directory, byte_tokenizer, prepare, accelerator=ONE, gpu_expert_slots=8, policy="static")
    assert found == expected


@pytest.mark.parametrize(("policy", "launches"), [("static", 3), ("on_demand/impact/lru", 5)])
def test_the_host_waits_once_a_layer(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, policy: str, launches: int
) -> None:
    """For the routing and the hidden states, together; uploads, transfers and kernels do not stop it. Beyond that a
    token waits for its id's way to the card and for the choice among the logits.

    launches: two kernels for a group of experts and one that adds up; experts that wait for transfers make two groups.
    """
    with fake_cards(1) as cards:

        def prepare(model: Any) -> None:
            cards.counts.clear()
            cards.sites.clear()

        greedy(
            save_model(tmp_path / "model", "bfloat16"), byte_tokenizer, prepare, accelerator=ONE, gpu_expert_slots=12,
            policy=policy, n_tokens=MANY_TOKENS,
        )  # fmt: skip
        steps = MANY_TOKENS + 1  # two chunks of the prompt; the last token is not computed any more
        calls, sites = N_LAYERS * steps, cards.sites
        assert sites["downloads.py:Downloads.fetch: host waits"] <= calls
        assert cards.counts["waits"] <= 2 * steps + LEARNING
        ours = {site: n for site, n in sites.items() if site.endswith(": launches") and "modeling_" not in site}
        copies = {site: n for site, n in ours.items() if site.startswith(("downloads.py", "uploads.py"))}
        assert sum(copies.values()) <= 5 * calls, "three tensors come, the plan and the CPU's rows go"
        experts = {site: n for site, n in ours.items() if site.startswith(("fused_choice.py", "torch_accelerator.py"))}
        experts.pop("torch_accelerator.py:_put: launches", None)
        assert sum(experts.values()) <= launches * calls + FIRST_USE
        assert cards.counts["attention plans"] == 0, "each token would wait for a plan that no other one uses"


OPTIONS = {
    "greedy": SamplingOptions(temperature=0.0),
    "qwen": SamplingOptions(temperature=0.6, top_k=20, top_p=0.95, seed=1),
    "all": SamplingOptions(temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, seed=1),
    "top_p alone": SamplingOptions(top_k=0, top_p=0.5, seed=1),
    "penalty": SamplingOptions(temperature=0.0, repetition_penalty=1.3),
    "drawn with a penalty": SamplingOptions(temperature=1.5, repetition_penalty=1.3, top_k=0, seed=1),
    "own penalties": SamplingOptions(temperature=0.9, frequency_penalty=0.5, presence_penalty=0.2, top_k=0, seed=1),
    "bias": SamplingOptions(temperature=0.9, logit_bias=((7, 5.0), (8, -100.0)), top_k=0, seed=1),
}
CANDIDATES_OF = {"greedy": 1, "qwen": 20, "all": 5}
"""The others choose among all tokens, on the card."""
BYTES_OF_A_CANDIDATE = 8
"""Its logit in float32 and its id in int32; a choice is sent with the largest logit, in as many."""


@pytest.mark.parametrize("name", OPTIONS)
def test_a_card_sends_the_candidates_of_a_choice_or_the_choice(tiny_model: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with fake_cards(1) as cards:
        sampler, on_host = (Sampler(tiny_model, OPTIONS[name], PROMPT) for _ in range(2))
        for _ in range(20):
            logits = torch.randn(257, generator=generator) * 4
            allowed = on_host._processors(on_host._ids, logits[None].clone())[0]
            before = cards.bytes_to_host
            token = sampler.next(logits.to(ONE))
            assert cards.bytes_to_host - before <= CANDIDATES_OF.get(name, 1) * BYTES_OF_A_CANDIDATE
            if name not in CANDIDATES_OF or on_host.greedy:
                assert token == on_host.next(logits), "the fake card draws the host's numbers"
            assert allowed[token] > float("-inf"), "one that transformers' processors leave"


def test_logits_that_move_from_a_card_to_the_host_and_back(tiny_model: Any) -> None:
    logits = torch.randn(257, generator=torch.Generator().manual_seed(0)) * 4
    with fake_cards(1):
        sampler = Sampler(tiny_model, OPTIONS["own penalties"], PROMPT)
        tokens = [sampler.next(each) for each in (logits.to(ONE), logits, logits.to(ONE))]
    assert all(0 <= token < 257 for token in tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no torch accelerator here")
def test_a_real_card_draws_what_torch_draws_there(tiny_model: Any) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    sampler = Sampler(tiny_model, SamplingOptions(temperature=1.0, top_k=0, seed=5), PROMPT)
    expected = torch.Generator(device=device).manual_seed(5)
    logits = torch.randn(20, 257, generator=torch.Generator().manual_seed(0)).to(device)
    for row in logits:
        drawn = torch.multinomial(torch.softmax(row.float(), dim=-1), 1, generator=expected)
        assert sampler.next(row) == int(drawn)


def test_infinite_logits_on_a_card_are_told(tiny_model: Any) -> None:
    with fake_cards(1):
        sampler = Sampler(tiny_model, OPTIONS["bias"], PROMPT)
        with pytest.raises(ModelError, match="not finite"):
            sampler.next(torch.full((257,), float("nan")).to(ONE))


def test_the_chances_of_candidates_are_those_of_all_tokens(tiny_model: Any) -> None:
    logits = torch.randn(257, generator=torch.Generator().manual_seed(0)) * 4
    options = SamplingOptions(temperature=0.7, top_k=8, top_p=0.95, min_p=0.01, seed=1)
    with fake_cards(1):
        sampler = Sampler(tiny_model, options, PROMPT)
        few = few_candidates(sampler._processors, logits.to(ONE), greedy=False)
        assert few is not None
        values, ids = (part.cpu() for part in few)
        scores = sampler._processors(sampler._ids, logits[None].clone())[0]
        reduced = sampler._processors(sampler._ids, values[None])[0]
    chances = torch.zeros(257)
    chances[ids] = torch.softmax(reduced, dim=-1)
    torch.testing.assert_close(chances, torch.softmax(scores, dim=-1))
