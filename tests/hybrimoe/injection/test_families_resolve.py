"""The shipped rules find all experts of every family of the installed transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tiny_families import FAMILIES

from hybrimoe.checkpoint.meta import meta_model
from hybrimoe.experts.layout import find_experts
from hybrimoe.injection import read_rules, resolve


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_rules_take_every_experts_module_and_nothing_else(family: str, tiny: Callable[..., Any]) -> None:
    config = tiny(family)
    model = meta_model(config)
    resolution = resolve(model, read_rules("auto", config.model_type))
    assert [hit.path for hit in resolution.hits if hit.layout is None] == []
    assert [hit.path for hit in resolution.experts] == [path for path, _ in find_experts(model)]
    assert len(resolution.experts) >= 2
    assert resolution.untouched_experts == ()
    assert resolution.remarks == ()
