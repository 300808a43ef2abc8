"""Every family's decode step as a card would replay it: recorded on noted graphs, which run what was recorded."""

from __future__ import annotations

import pytest
import torch
from family_check import outputs
from tiny_families import FAMILIES, tiny_model

import hybrimoe
from hybrimoe.step.build import capture_step
from tests.fake_device.graphs import NotedGraphs

pytestmark = pytest.mark.families

TOLERANCE = 1e-4
NOT_CAPTURED = {
    "minimax": "a cache of its own kind",
    "deepseek_v4": "its cache has layers",  # compressed keys and values, and what is not compressed yet
    "qwen4_exp": "its cache has layers",  # an index that keeps the positions of its tokens
    "unlimited_ocr": "its cache has layers",  # a window beside the whole of the first prompt
}
"""Families that keep transformers' forward on a card, and how the reason begins."""


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    model = tiny_model(family)
    plain = outputs(model)
    injection = hybrimoe.inject(model, accelerator="emulated", gpu_expert_slots=4, expert_dtype="float32")
    injection.way = capture_step(model, injection.session, torch.device("cpu"), NotedGraphs())
    if family in NOT_CAPTURED:
        assert injection.way.step is None
        assert NOT_CAPTURED[family] in str(injection.way.reason)
        return
    assert injection.way.step is not None, injection.way.reason
    found = outputs(model)
    assert injection.way.step.n_steps > 0
    assert float((found.decode - plain.decode).abs().max()) <= TOLERANCE
    assert torch.equal(found.tokens, plain.tokens)
    injection.restore()


def test_no_family_is_excused_that_does_not_exist() -> None:
    assert set(NOT_CAPTURED) <= set(FAMILIES)
