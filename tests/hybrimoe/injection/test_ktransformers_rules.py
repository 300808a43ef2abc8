"""KTransformers' rule files load: experts become our operators, the rest keeps its device, nothing is silent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.checkpoint.meta import meta_model
from hybrimoe.errors import RuleError
from hybrimoe.injection import Explanation, explain, read_rules
from yaml_rules.ktransformers import KNOWN_CLASSES, TABLE

FILES = Path(__file__).parent / "data" / "ktransformers"
EXPERTS = "ktransformers.operators.experts.KTransformersExperts"


def ops(explanation: Explanation) -> dict[str, tuple[str, str]]:
    return {row.path: (row.op, row.device) for row in explanation.rows}


def test_single_gpu_rules(tiny: Callable[..., Any]) -> None:
    explanation = explain(meta_model(tiny("deepseek_v2")), FILES / "deepseek-v2-lite.yaml")
    found = ops(explanation)
    assert found["model.layers.1.mlp.experts"] == ("hybrid_experts", "cpu + accelerator")
    assert found["model.layers.1.self_attn.q_a_proj"] == ("default", "cuda")
    assert found["model.embed_tokens"] == ("default", "cpu")
    assert found["model"] == ("ignored", "")
    assert "model.layers.1.self_attn.kv_b_proj" not in found  # the look-ahead of the rule leaves it out
    assert any("rule 5: KDeepseekV2Model has no effect" in remark for remark in explanation.remarks)
    assert any(
        "rule 2: match: no module is a" in remark and "DeepseekV2Moe" in remark for remark in explanation.remarks
    )


def test_multi_gpu_rules(tiny: Callable[..., Any]) -> None:
    found = ops(explain(meta_model(tiny("deepseek_v3", num_hidden_layers=4)), FILES / "deepseek-v3-two-gpus.yaml"))
    experts = [found[f"model.layers.{layer}.mlp.experts"][0] for layer in range(4)]
    assert experts == ["hybrid_experts", "hybrid_experts", "accelerator_experts", "cpu_experts"]
    assert found["model.layers.0.input_layernorm"] == ("default", "cuda:0")
    assert found["model.layers.3.input_layernorm"] == ("default", "cuda:1")
    assert found["lm_head"] == ("default", "cuda:1")


def test_the_backend_of_amx_rules_sets_the_dtype(tiny: Callable[..., Any]) -> None:
    explanation = explain(meta_model(tiny("qwen3_moe")), FILES / "qwen3-moe-serve.yaml", expert_dtype="bfloat16")
    assert {row.expert_dtype for row in explanation.rows if row.n_experts} == {"int8"}


def test_old_module_names_are_known(tiny: Callable[..., Any]) -> None:
    found = ops(explain(meta_model(tiny("mixtral")), FILES / "mixtral-early.yaml"))
    assert found["model.layers.0.mlp.experts"][0] == "hybrid_experts"


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"class": EXPERTS.replace("Experts", "Expert", 1)}, "has no counterpart here"),
        ({"class": "ktransformers.operators.linear.KTransformersLiner"}, "did you mean '.*KTransformersLinear'"),
        ({"class": "os.system"}, "'os.system' has no counterpart here"),
        ({"class": "linear.KTransformersLinear"}, "has no counterpart here; did you mean '.*KTransformersLinear'"),
        ({"class": "ktransformers.operators.ascend.ascend_experts.KExpertsCPUW8A8"}, "8 bits"),
        (
            {"class": EXPERTS, "kwargs": {"generate_devise": "cpu"}},
            "kwarg 'generate_devise'; did you mean 'generate_de",
        ),
        ({"class": EXPERTS, "kwargs": {"n_deferred_experts": [4]}}, "expert deferral changes results"),
        ({"class": EXPERTS, "kwargs": {"backend": "AMXInt3"}}, "unknown backend 'AMXInt3'; did you mean 'AMXInt"),
        ({"class": "default", "kwargs": {"generate_device": "cdua"}}, "expected a device"),
    ],
)
def test_what_has_no_counterpart_is_a_clear_error(replace: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=message) as caught:
        read_rules([{"match": {"name": "experts"}, "replace": replace}])
    assert "rule 0" in str(caught.value)


@pytest.mark.parametrize("family", ["Llama4", "Glm4", "Smallthinker", "NextYears"])
def test_experts_classes_of_any_family_are_experts(family: str) -> None:
    kwargs = {"generate_device": "cpu", "prefill_device": "cuda", "out_device": "cuda"}
    rule = {"match": {"name": "experts$"}, "replace": {"class": EXPERTS.replace("KTransformers", f"K{family}")}}
    (bound,) = read_rules([{**rule, "replace": {**rule["replace"], "kwargs": kwargs}}]).rules
    assert bound.operator is not None
    assert bound.operator.name == "hybrid_experts"


def test_the_device_of_early_rules_is_read() -> None:
    linear = {"class": EXPERTS.replace("experts.KTransformersExperts", "linear.KTransformerLinear")}
    template = {"device": "cpu", "kwargs": {"generate_device": "cuda", "generate_linear_type": "QuantizedLinearMarlin"}}
    layer_wise = {
        "class": EXPERTS.replace("experts.KTransformersExperts", "models.KDeepseekV2Model"),
        "kwargs": {"per_layer_prefill_intput_threshold": 0, "device": "xpu"},
    }
    placed, alone, ignored = read_rules(
        [
            {"match": {"name": "layers"}, "replace": {**linear, **template}},
            {"match": {"name": "head"}, "replace": {**linear, "kwargs": {"device": "cuda:1"}}},
            {"match": {"name": "^model$"}, "replace": layer_wise},
        ]
    ).rules
    assert placed.kwargs.model_dump()["device"] == "cuda"  # where it runs, not where it was put first
    assert alone.kwargs.model_dump()["device"] == "cuda:1"
    assert ignored.operator is None
    with pytest.raises(RuleError, match="device stands beside class only"):
        read_rules([{"match": {"name": "x"}, "replace": {"op": "default", "device": "cpu"}}])


def test_an_experts_rule_that_matches_nothing_is_an_error(tiny: Callable[..., Any]) -> None:
    rules = [{"match": {"name": "block_sparse_moe.expert$"}, "replace": {"class": EXPERTS}}]
    with pytest.raises(RuleError, match="rule 0: match: no module's name matches"):
        explain(meta_model(tiny("qwen3_moe")), rules)


def test_every_suggested_class_is_in_the_table() -> None:
    rules = [{"match": {"name": "x"}, "replace": {"class": name}} for name in KNOWN_CLASSES]
    assert len(read_rules(rules).rules) == len(KNOWN_CLASSES)
    assert {entry.effect for entry in TABLE} == {"experts", "placement", "ignored", "refused"}
