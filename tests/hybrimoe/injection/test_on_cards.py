"""inject() of a model that lies on a card already (fake ones): the CPU's tokens, and everything back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import hybrimoe
from hybrimoe.checkpoint.meta import meta_model
from hybrimoe.dense.place import move
from hybrimoe.experts.activation import recognise_activation
from hybrimoe.experts.layout import find_experts
from tests.fake_device import DEVICE_TYPE, fake_cards

FIRST = torch.device(DEVICE_TYPE, 0)
ONE = str(FIRST)
PROMPT, N_TOKENS = [3, 1, 4, 1, 5, 9, 2, 6], 6
SCHEDULER = {"policy": "on_demand/impact/lru"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Callable[[Path], Path]) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path / "cache")))


def greedy(model: PreTrainedModel, device: torch.device | str = "cpu") -> list[int]:
    """Tokens after the prompt, each by a call of the whole sequence."""
    tokens = list(PROMPT)
    for _ in range(N_TOKENS):
        with torch.no_grad():
            logits = model(torch.tensor([tokens], device=device), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def weights(model: nn.Module) -> dict[str, tuple[int, torch.device]]:
    return {name: (id(weight), weight.device) for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"accelerator": ONE, "gpu_expert_slots": 0.25},
        {"accelerator": ONE, "gpu_expert_slots": 1.0},
        {"accelerator": ONE, "gpu_expert_slots": 0.25, "dense_dtype": "int8"},
        {"accelerator": "none"},
        {"accelerator": "emulated", "gpu_expert_slots": 0.25},
        {"gpu_expert_slots": 0.25},
        {"accelerator": ONE, "rules": "cpu"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_tokens_are_those_of_the_cpu(qwen3: PreTrainedModel, settings: dict[str, Any]) -> None:
    expected = greedy(qwen3)
    with fake_cards(1) as cards:
        move(qwen3, FIRST)
        before = weights(qwen3)
        injection = hybrimoe.inject(qwen3, expert_dtype="float32", backend="torch", scheduler=SCHEDULER, **settings)
        assert greedy(qwen3, FIRST) == expected
        total = injection.stats().total
        assert bool(total.accel_experts) == bool(injection.session.n_slots)
        injection.restore()
        assert weights(qwen3) == before
    assert cards.counts["launches"] > 0


@pytest.mark.parametrize("family", ["gpt_oss", "muse_spark"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_every_form_of_weights_is_read(tiny: Callable[..., Any], family: str, dtype: str) -> None:
    """Transposed matrices with biases; a norm after each expert, which the CPU lane needs as well."""
    torch.manual_seed(0)
    config = tiny(family)
    model = type(meta_model(config))(config).float().eval()
    on_host = copy.deepcopy(model)
    injection = hybrimoe.inject(on_host, accelerator="none", expert_dtype=dtype)
    expected = greedy(on_host)
    injection.restore()
    with fake_cards(1):
        move(model, FIRST)
        with hybrimoe.inject(model, accelerator=ONE, gpu_expert_slots=0.25, expert_dtype=dtype, scheduler=SCHEDULER):
            assert greedy(model, FIRST) == expected


class Slope(nn.Module):
    """An activation with a weight of its own, in no closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * self.slope


def test_an_activation_with_weights_runs_on_both_sides(qwen3: PreTrainedModel) -> None:
    for _, experts in find_experts(qwen3):
        experts.act_fn = Slope()
    expected = greedy(qwen3)
    with fake_cards(1):
        move(qwen3, FIRST)
        assert recognise_activation(find_experts(qwen3)[0][1], gated=True, concatenated=True).kind == "custom"
        with hybrimoe.inject(qwen3, accelerator=ONE, gpu_expert_slots=0.25, expert_dtype="float32", backend="torch"):
            assert greedy(qwen3, FIRST) == expected
