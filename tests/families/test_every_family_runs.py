"""Every causal-LM family of the installed transformers gives its own logits and tokens through the hybrid runtime."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from family_check import PLACEMENTS, Comparison, Outputs, compare, plain_outputs
from tiny_families import FAMILIES, tiny_model
from transformers import PreTrainedModel

from hybrimoe.experts.layout import find_experts

pytestmark = pytest.mark.families

LOGIT_TOLERANCE = 1e-4
EXPERTS_MATTER = 1e-2  # without its experts a model must give other logits, or the comparison would show nothing


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> Iterator[PreTrainedModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_model(family)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(model: PreTrainedModel) -> Outputs:
    return plain_outputs(model)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_family(model: PreTrainedModel, plain: Outputs, placement: str) -> None:
    result = compare(model, plain, placement)
    assert result.prefill_error <= LOGIT_TOLERANCE
    assert result.decode_error <= LOGIT_TOLERANCE
    assert result.same_tokens
    assert result.restored
    assert_lanes(result, placement)


def test_experts_matter(model: PreTrainedModel, plain: Outputs) -> None:
    modules = [module for _, module in find_experts(model)]
    saved = [{name: value.clone() for name, value in module.named_parameters()} for module in modules]
    with torch.no_grad():
        for module in modules:
            for value in module.parameters():
                value.zero_()
        changed = plain_outputs(model).prefill
        for module, values in zip(modules, saved, strict=True):
            for name, value in module.named_parameters():
                value.copy_(values[name])
    assert float((changed - plain.prefill).abs().max()) > EXPERTS_MATTER


def assert_lanes(result: Comparison, placement: str) -> None:
    """The placement is what its name says."""
    assert (result.cpu_experts > 0) == (placement in ("cpu", "mixed"))
    assert (result.accel_experts > 0) == (placement in ("accelerator", "mixed"))
