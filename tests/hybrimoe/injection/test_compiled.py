"""torch.compile of an injected model: right, and the compiler does not walk the runtime's frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, StaticCache

import hybrimoe

OUTSIDE = "_run_outside_graphs"
"""The method at which a graph breaks; in front of it the compiler stops."""
SLOTS: dict[str, Any] = {"accelerator": "emulated", "gpu_expert_slots": 0.5, "expert_dtype": "float32"}
CASES = [
    ("qwen3_moe", SLOTS | {"dense_dtype": "int8"}),
    pytest.param("llama4", {"accelerator": "none", "expert_dtype": "float32"}, marks=pytest.mark.families),
    pytest.param("gpt_oss", SLOTS, marks=pytest.mark.families),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def make(family: str, **sizes: int) -> PreTrainedModel:
    from tiny_families import tiny_model

    return tiny_model(family, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_compiled_model_gives_the_same_logits(family: str, settings: dict[str, Any]) -> None:
    from tiny_families import prompt

    model = make(family, num_hidden_layers=1)  # each layer is traced anew, for seconds
    with hybrimoe.inject(model, **settings), torch.no_grad():
        expected = model(prompt()).logits
        compiled = torch.compile(model, backend="eager")  # what is traced is tested, not what a backend makes of it
        for _ in range(2):
            torch.testing.assert_close(compiled(prompt()).logits, expected)
        breaks = {reason: n for reason, n in counters["graph_break"].items() if OUTSIDE not in reason}
        assert not [reason for reason in breaks if "hybrimoe" in reason]
        assert any(OUTSIDE in reason for reason in counters["graph_break"])


@pytest.mark.slow
def test_decoding_with_a_static_cache_and_a_compiled_forward() -> None:
    from tiny_families import prompt

    model = make("qwen3_moe", num_hidden_layers=1).to(torch.bfloat16)
    with hybrimoe.inject(model, accelerator="none"), torch.no_grad():
        expected = model.generate(prompt(), max_new_tokens=4, do_sample=False, cache_implementation="static")
        model.forward = torch.compile(model.forward, backend="eager")
        cache = StaticCache(config=model.config, max_cache_len=32)
        found = model.generate(prompt(), max_new_tokens=4, do_sample=False, past_key_values=cache)
        del model.forward
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's tracer looks at it
def test_training_through_a_compiled_model() -> None:
    from tiny_families import prompt

    model = make("qwen3_moe", num_hidden_layers=1)
    with hybrimoe.inject(model, accelerator="none", expert_dtype="float32"):
        model(prompt()).logits.square().sum().backward()
        weight = model.model.layers[0].self_attn.q_proj.weight
        expected = weight.grad.clone()
        model.zero_grad()
        torch.compile(model, backend="eager")(prompt()).logits.square().sum().backward()
        torch.testing.assert_close(weight.grad, expected)
