"""Dense weights are moved to a real accelerator once, ties and placeholders included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, PreTrainedModel

from hybrimoe.config.deploy import load_config
from hybrimoe.dense.place import dense_device, move, place_dense

from .conftest import SMALL


@pytest.mark.parametrize("name", ["none", "emulated"])
def test_no_real_accelerator_moves_nothing(name: str, mixtral: PreTrainedModel) -> None:
    before = {key: id(value) for key, value in mixtral.named_parameters()}
    place_dense(mixtral, load_config({}, accelerator=name))
    assert {key: id(value) for key, value in mixtral.named_parameters()} == before


def test_auto_is_what_torch_finds() -> None:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    assert dense_device(load_config({}, accelerator="auto")) == found


def test_moving_keeps_ties_values_and_placeholders(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(MixtralConfig(**SMALL, tie_word_embeddings=True))
    experts: Any = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(torch.empty_like(experts.down_proj, device="meta"))
    expected = {key: value.clone() for key, value in model.state_dict().items() if not value.is_meta}
    weights = dict(model.named_parameters())
    move(model, torch.device("cpu"))
    assert all(weights[name] is value for name, value in model.named_parameters()), "what is there stays"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert experts.down_proj.is_meta
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())


def test_moving_takes_every_weight_and_buffer_along(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(MixtralConfig(**SMALL, tie_word_embeddings=True))
    move(model, torch.device("meta"))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.lm_head.weight is model.model.embed_tokens.weight
