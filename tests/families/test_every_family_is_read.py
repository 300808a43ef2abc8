"""Every decorated experts module is read in normal form, and the reference FFN on it gives the module's own output."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES, FOREIGN, NOT_CAUSAL, SMALL, UNDECORATED, decorated_families, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cpu_kernels import reference_ffn
from hybrimoe.errors import UnsupportedExpertsError
from hybrimoe.experts.layout import FOREIGN_EXPERTS, SORTED_EXPERTS, ExpertsLayout, find_experts, read

pytestmark = pytest.mark.families

N_TOKENS, TOP_K = 24, 2
GATES = {
    "gpt_oss": {"alpha": 1.702, "gate_max": 7.0, "up_limit": 7.0, "up_offset": 1.0},
    "minimax_m3_vl": {"alpha": 1.702, "gate_max": 7.0, "up_limit": 7.0, "up_offset": 1.0},
    "deepseek_v4": {"gate_max": 10.0, "up_limit": 10.0},
    "hy_v4": {"gate_max": 10.0, "up_limit": 10.0},
    "hy_v4_vl": {"gate_max": 10.0, "up_limit": 10.0},
    "glm5_next": {"gate_max": 10.0, "up_limit": 10.0},
    "nemotron_h": {"kind": "relu2", "gated": False},
    "gemma4": {"kind": "gelu_tanh"},
    "inkling2": {"kind": "custom"},
    "inkling2_loop": {"kind": "custom"},
    "step3p7": {"act_max": 3.0, "up_limit": 3.0},
}
PLAIN = {
    "kind": "silu", "gated": True, "alpha": 1.0, "gate_max": None, "act_max": None, "up_limit": None, "up_offset": 0.0
}  # fmt: skip


def test_no_family_is_left_out() -> None:
    """A new family of transformers needs an entry in FAMILIES, or a reason in NOT_CAUSAL; a removed one leaves it."""
    named = (set(FAMILIES) | set(NOT_CAUSAL)) - set(UNDECORATED)
    assert set(decorated_families()) - named == set(), "families without a tiny configuration"
    assert named - set(decorated_families()) == set(), "families that transformers no longer has"
    assert not set(FAMILIES) & set(NOT_CAUSAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_on_the_layout_is_the_modules_own_forward(family: str) -> None:
    model = tiny_model(family)
    found = find_experts(model)
    assert len(found) >= 2
    for _, module in found:
        layout = read(module)
        assert layout.num_experts == SMALL["num_experts"]
        assert not layout.is_meta
        hidden = 2 * torch.randn(N_TOKENS, layout.hidden, generator=torch.Generator().manual_seed(1))
        index, weights = _routing(layout.num_experts)
        with torch.no_grad():
            if type(module).__name__ in SORTED_EXPERTS:
                weights = torch.ones_like(weights)
                expected = _by_sorted_call(module, layout.num_experts, hidden, index)
            else:
                expected = module(hidden, index, weights)
            found_output = _by_reference(layout, hidden, index, weights)
        torch.testing.assert_close(found_output, expected, rtol=1e-4, atol=1e-4)
        assert expected.abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_is_recognised(family: str) -> None:
    specs = {read(module).spec("int8") for _, module in find_experts(tiny_model(family))}
    assert len(specs) == 1, "layers of one shape share one spec"
    activation = specs.pop().activation
    expected = PLAIN | GATES.get(family, {})
    if expected["kind"] == "custom":
        assert activation.kind == "custom"
        assert activation.custom is not None
        return
    assert {name: getattr(activation, name) for name in expected} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_model_gives_the_same_layout(family: str) -> None:
    causal = FAMILIES[family].model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    with torch.device("meta"):
        meta = auto.from_config(tiny_config(FAMILIES[family]))
    real = find_experts(tiny_model(family))
    assert [path for path, _ in find_experts(meta)] == [path for path, _ in real]
    for (_, placeholder), (_, module) in zip(find_experts(meta), real, strict=True):
        assert read(placeholder).is_meta
        assert read(placeholder).spec("bfloat16") == read(module).spec("bfloat16")


@pytest.mark.parametrize("family", FOREIGN)
def test_experts_of_another_form_are_refused_with_the_reason(family: str) -> None:
    tiny, class_name = FOREIGN[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(tiny))
    with pytest.raises(UnsupportedExpertsError, match=f"{class_name}.*{FOREIGN_EXPERTS[class_name]}"):
        find_experts(model)


def _routing(num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(N_TOKENS, num_experts, generator=generator)
    weights, index = scores.topk(TOP_K, dim=-1)
    return index, weights


def _by_reference(
    layout: ExpertsLayout, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    output = torch.zeros_like(hidden)
    spec = layout.spec("float32")
    norm = layout.post_expert_norm or nn.Identity()
    for expert in range(layout.num_experts):
        tokens, ranks = torch.where(index == expert)
        rows = norm(reference_ffn(spec, layout.expert(expert), hidden[tokens]))
        output.index_add_(0, tokens, rows * weights[tokens, ranks, None])
    return output


def _by_sorted_call(module: nn.Module, num_experts: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Llama-4's call, with scores of one: row [e, t] is token t where expert e is selected, else zero."""
    selected = torch.zeros(num_experts, len(hidden)).scatter_(0, index.T, 1.0)
    rows = (selected[:, :, None] * hidden).flatten(0, 1)
    return module(rows).view(num_experts, *hidden.shape).sum(dim=0)
