"""A loaded model whose experts in slots have no host copy: the same tokens, and the weights come back by `restore`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hybrimoe
from tests.fake_device import DEVICE_TYPE, fake_cards
from tests.hybrimoe.generation.test_on_cards import greedy, save_model

STATIC = {"policy": "static", "gpu_expert_slots": 12}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Callable[[Path], Path]) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path / "cache")))


def test_tokens_are_the_same_on_the_emulated_accelerator_and_on_a_card(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save_model(tmp_path / "model", "float32")
    expected, kept = greedy(folder, byte_tokenizer, accelerator="emulated", **STATIC)
    assert kept.dropped_bytes == 0
    for _ in range(2):  # packed, then from the packed file
        found, stats = greedy(folder, byte_tokenizer, accelerator="emulated", host_copy="drop", **STATIC)
        assert found == expected
        assert stats.total.accel_experts == kept.total.accel_experts > 0
        assert 0 < stats.dropped_bytes < stats.store_bytes < kept.store_bytes
    with fake_cards(1):
        found, stats = greedy(folder, byte_tokenizer, accelerator=f"{DEVICE_TYPE}:0", host_copy="drop", **STATIC)
    assert found == expected
    assert 0 < stats.dropped_bytes < stats.store_bytes < kept.store_bytes


def test_restore_and_saving_have_every_weight(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "float32")
    own = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model = hybrimoe.load(
        folder, accelerator="emulated", host_copy="drop", expert_dtype="float32", backend="torch", progress=False,
        **STATIC,
    )  # fmt: skip
    assert model.hybrimoe.session.store.released()
    full = model.hybrimoe.full_state_dict()
    assert all(torch.equal(full[name], weight) for name, weight in own.items())
    assert model.hybrimoe.session.store.released(), "they were read one by one"
    model.hybrimoe.restore()
    restored = model.state_dict()
    assert all(torch.equal(restored[name], weight) for name, weight in own.items())
