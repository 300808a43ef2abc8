"""What a planner learns of a model's routing: kept at the end, there at the next start, carried over changed slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, PreTrainedModel

from hybrimoe.checkpoint import load
from hybrimoe.runtime.learnt import RoutingFile, RoutingWarning, told_from
from scheduler.forecast.use_model import SLOW, Learnt, UseModel

from .conftest import SMALL
from .models import OPTIONS

ON_A_CARD = {"policy": "ours", "accelerator": "emulated", "step": "transformers", "gpu_expert_slots": 8}


@pytest.fixture
def directory(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """A Mixtral with 24 experts."""
    config = MixtralConfig(**SMALL | {"num_hidden_layers": 3, "num_local_experts": 8})
    make_model(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def opened(directory: Path) -> Iterator[Callable[..., PreTrainedModel]]:
    """Loads the model with slots, and closes it."""
    models = []

    def open_with(**options: Any) -> PreTrainedModel:
        models.append(load(directory, **OPTIONS | ON_A_CARD | options))
        return models[-1]

    yield open_with
    for model in models:
        model.hybrimoe.session.close()


def decode(model: PreTrainedModel, n_tokens: int = 20) -> None:
    """A prompt and so many decode steps."""
    with torch.inference_mode():
        output = model(torch.arange(6)[None], use_cache=True)
        for token in range(n_tokens):
            output = model(torch.tensor([[7 * token % 60]]), past_key_values=output.past_key_values, use_cache=True)


def known(model: PreTrainedModel) -> Learnt:
    """A copy of what the planner has learnt."""
    learnt = model.hybrimoe.session.planner.learnt()
    return {name: array.copy() for name, array in learnt.items()}


def assert_same(left: Learnt, right: Learnt) -> None:
    """Alike but for how far ahead was forecast, which follows from measured costs."""
    right = told_from(right, left["distance"])
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-2, atol=1e-3, err_msg=name)


def test_the_next_start_knows_what_was_learnt(directory: Path, opened: Callable[..., PreTrainedModel]) -> None:
    first = opened()
    assert not known(first)["same_token"].any()
    decode(first)
    learnt = known(first)
    assert learnt["same_token"].any()
    first.hybrimoe.session.close()
    assert list(directory.rglob("*.routing.npz"))

    second = opened()
    assert_same(known(second), learnt)
    session = second.hybrimoe.session
    in_slots = {(layer, expert) for layer, expert in session.planner.contents().values()}
    shares = learnt["rates"][:, SLOW] / learnt["rates"][:, SLOW].sum(axis=1, keepdims=True)
    most = {tuple(map(int, divmod(key, 8))) for key in np.argsort(-shares.ravel(), kind="stable")[:8]}
    assert in_slots == most, "the slots begin with what was used most lately"


def test_changed_slots_and_nothing_else_are_new(opened: Callable[..., PreTrainedModel]) -> None:
    model = opened()
    decode(model)
    learnt = known(model)
    model.hybrimoe.session.resize_slots(6)
    assert_same(known(model), learnt)


def test_policies_without_a_forecast_keep_nothing(directory: Path, opened: Callable[..., PreTrainedModel]) -> None:
    model = opened(policy="hybrimoe")
    decode(model)
    model.hybrimoe.session.close()
    assert not list(directory.rglob("*.routing.npz"))


@pytest.mark.parametrize(("before", "now", "moved"), [(1, 1, [1, 2, 3]), (1, 2, [2, 3, 0]), (3, 1, [0, 0, 1])])
def test_a_forecast_from_another_layer_moves_its_sources(before: int, now: int, moved: list[int]) -> None:
    """Sources 1, 2 and 3 layers before where the forecast was made from 1 layer before."""
    weights = np.tile(np.array([1.0, 2.0, 3.0], np.float32)[None, :, None, None], (2, 1, 4, 4))
    found = told_from({"same_token": weights, "distance": np.full(2, before)}, np.full(2, now))
    assert found["same_token"][0, :, 0, 0].tolist() == moved
    assert found["distance"].tolist() == [now] * 2


def lived() -> Learnt:
    model = UseModel(2, 4, 1)
    model.next_token[:] = 1.5
    return model.learnt()


def test_a_file_holds_what_was_learnt_in_the_first_folder_that_takes_it(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("no folder")
    file = RoutingFile("experts-x.hybrimoe", [tmp_path / "taken", tmp_path / "free"])
    assert file.read() is None
    path = file.save(lived())
    assert path == tmp_path / "free" / "experts-x.hybrimoe.routing.npz"
    found = file.read()
    assert found is not None
    assert UseModel(2, 4, 1).recall(found)
    assert found["next_token"].dtype == np.float32
    assert_same(found, lived())


def begin_with(file: RoutingFile) -> None:
    """As a start does."""
    model = UseModel(2, 4, 1)
    learnt = file.read()
    if learnt is not None:
        model.recall(told_from(learnt, model.learnt()["distance"]))


def test_a_start_passes_over_a_damaged_file(tmp_path: Path) -> None:
    file = RoutingFile("x", [tmp_path])
    path = file.save(lived())
    assert path is not None
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert file.read() is None
    chance = np.random.default_rng(3)
    for place in chance.integers(len(whole), size=300):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(chance.integers(8))]) + whole[place + 1 :])
        begin_with(file)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("distance", np.array(1)),
        ("distance", np.ones(3, np.int64)),
        ("same_token", np.zeros(2, np.float32)),
        ("same_token", np.zeros((2, 0, 4, 4), np.float32)),
        ("rates", np.full((2, 3, 4), np.nan)),
        ("even", np.array(["a", "b"])),
        ("next_token", np.array(["a", "b"])),
        ("more", np.zeros(2)),
    ],
)
def test_a_start_passes_over_arrays_that_do_not_fit(tmp_path: Path, name: str, array: np.ndarray) -> None:
    with (tmp_path / "x.routing.npz").open("wb") as content:
        np.savez(content, **lived() | {name: array})  # type: ignore[arg-type]
    begin_with(RoutingFile("x", [tmp_path]))


def test_nothing_learnt_is_no_file_and_no_place_a_warning(tmp_path: Path) -> None:
    assert RoutingFile("x", [tmp_path]).save(UseModel(2, 4, 1).learnt()) is None
    assert RoutingFile("x", []).save(lived()) is None
    assert not list(tmp_path.rglob("*.npz"))
    (tmp_path / "taken").write_text("no folder")
    with pytest.warns(RoutingWarning, match="could not be kept for the next start.*taken"):
        RoutingFile("x", [tmp_path / "taken"]).save(lived())
