"""Which rule is for which module, and that a rule which cannot work says why, where, and what was meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from hybrimoe.checkpoint.meta import meta_model
from hybrimoe.errors import ModelError, RuleError, UnsupportedExpertsError
from hybrimoe.injection import explain, read_rules, resolve

EXPERTS = [f"model.layers.{layer}.mlp.experts" for layer in range(3)]


def rule(match: dict[str, Any], op: str = "hybrid_experts", **more: Any) -> dict[str, Any]:
    return {"match": match, "replace": {"op": op, "kwargs": more.pop("kwargs", {})}, **more}


def paths(model: nn.Module, *rules: dict[str, Any]) -> dict[str, int]:
    """Path of each hit -> index of its rule."""
    return {hit.path: hit.rule.rule.index for hit in resolve(model, read_rules(list(rules))).hits}


def test_auto_takes_every_experts_module(qwen3_meta: PreTrainedModel) -> None:
    resolution = resolve(qwen3_meta, read_rules("auto", "qwen3_moe"))
    assert [hit.path for hit in resolution.experts] == EXPERTS
    assert resolution.untouched_experts == ()
    assert all(hit.layout is not None and hit.layout.num_experts == 8 for hit in resolution.experts)


def test_first_match_wins(qwen3_meta: PreTrainedModel) -> None:
    found = paths(
        qwen3_meta, rule({"name": r"\.experts$", "layers": "1"}, "cpu_experts"), rule({"class": "Qwen3MoeExperts"})
    )
    assert found == {EXPERTS[0]: 1, EXPERTS[1]: 0, EXPERTS[2]: 1}


def test_untouched_experts_are_named(qwen3_meta: PreTrainedModel) -> None:
    resolution = resolve(qwen3_meta, read_rules([rule({"name": r"\.experts$", "layers": "1"})]))
    assert resolution.untouched_experts == (EXPERTS[0], EXPERTS[2])


def test_recursive_false_lets_no_rule_inside(qwen3_meta: PreTrainedModel) -> None:
    keep = rule({"name": r"layers\.0\.mlp$"}, "default", recursive=False)
    assert paths(qwen3_meta, keep, rule({"name": r"\.experts$"})) == {
        "model.layers.0.mlp": 0, EXPERTS[1]: 1, EXPERTS[2]: 1,
    }  # fmt: skip


def test_nothing_matches_inside_replaced_experts(qwen3_meta: PreTrainedModel) -> None:
    found = paths(qwen3_meta, rule({"name": r"\.experts$"}), rule({"name": "act_fn"}, "default", optional=True))
    assert set(found) == set(EXPERTS)


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ({"name": r"^model\.layers\..*\.mlp\.expert$"}, r"nearest module is model\.layers\.0\.mlp\.experts$"),
        ({"name": r"self_atn"}, r"nearest module is model\.layers\.0\.self_attn"),
        ({"class": "Qwen3MoeExpert"}, r"nearest class is Qwen3MoeExperts$"),
        ({"class": "torch.nn.Linaer"}, r"nearest class is Linear$"),
        ({"name": r"\.experts$", "class": "Linear"}, r"they are Qwen3MoeExperts$"),
        ({"name": r"\.experts$", "layers": "7-9"}, r"it would match in layers 0-2$"),
        ({"name": "^lm_head$", "layers": "0"}, r"lm_head, belong to no layer$"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest(
    qwen3_meta: PreTrainedModel, tmp_path: Path, match: dict[str, str], message: str
) -> None:
    path = tmp_path / "rules.yaml"
    conditions = ", ".join(f"{key}: '{value}'" for key, value in match.items())
    path.write_text(
        "- match: {name: '.experts$'}\n  replace: {op: hybrid_experts}\n"
        f"- match: {{{conditions}}}\n  replace: {{op: default}}\n",
        encoding="utf-8",
    )
    with pytest.raises(RuleError) as caught:
        resolve(qwen3_meta, read_rules(path))
    assert str(caught.value).startswith(f"{path}:3: rule 1: match: ")
    assert re.search(message, str(caught.value))


def test_an_optional_rule_may_match_nothing(qwen3_meta: PreTrainedModel) -> None:
    everything = rule({"name": r"\.experts$"})
    assert len(paths(qwen3_meta, rule({"name": "nowhere"}, "default", optional=True), everything)) == 3


def test_a_shadowed_rule_names_the_one_that_shadows_it(qwen3_meta: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(
        "- match: {name: '.experts$'}\n  replace: {op: hybrid_experts}\n"
        "- match: {name: 'experts$', layers: 1}\n  replace: {op: cpu_experts}\n",
        encoding="utf-8",
    )
    expected = f"{path}:3: rule 1 is shadowed: earlier rules take all its modules ({EXPERTS[1]}: by {path}:1: rule 0)"
    with pytest.raises(RuleError, match=re.escape(expected)):
        resolve(qwen3_meta, read_rules(path))


def test_an_inherited_rule_may_be_shadowed_by_own_ones(qwen3_meta: PreTrainedModel) -> None:
    own = {"version": 1, "extends": "moe", "rules": [rule({"name": r"\.experts$"}, "cpu_experts")]}
    resolution = resolve(qwen3_meta, read_rules(own))
    assert {hit.rule.operator.name for hit in resolution.experts if hit.rule.operator} == {"cpu_experts"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (rule({"name": "a"}, "hybrid_expert"), "rule 0: replace.op: unknown operator .*did you mean 'hybrid_experts'"),
        (rule({"name": "a"}, "os.system"), "unknown operator 'os.system'"),
        (
            rule({"name": "a"}, kwargs={"expert_dtyp": "int4"}),
            "rule 0: unknown key 'replace.kwargs.expert_dtyp'; did you mean 'expert_dtype'",
        ),
        (rule({"name": "a"}, kwargs={"expert_dtype": "int7"}), "replace.kwargs.expert_dtype: .*found 'int7'"),
        (rule({"name": "a"}, "default", kwargs={"device": "cdua:0"}), "expected a device .* found 'cdua:0'"),
    ],
)
def test_operators_and_their_arguments_are_checked_without_a_model(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        read_rules([bad])


def test_an_experts_operator_on_another_module_names_the_experts(qwen3_meta: PreTrainedModel) -> None:
    with pytest.raises(RuleError, match=r"hybrid_experts is for experts, and model.layers.0.mlp \(Qwen3MoeSparse.*"
                                        r"nearest one is model.layers.0.mlp.experts"):  # fmt: skip
        paths(qwen3_meta, rule({"name": r"\.mlp$"}))


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no experts: .* dense"):
        explain(meta_model(config))


def test_experts_of_an_unknown_form_are_refused() -> None:
    class StrangeExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(2, 3, 4))

    model = nn.ModuleDict({"experts": StrangeExperts()})
    with pytest.raises(UnsupportedExpertsError, match="StrangeExperts"):
        resolve(model, read_rules("moe"))


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no model directory: it has no config.json"):
        explain(meta_model(tmp_path))
    with pytest.raises(ModelError, match="no model directory"):
        explain(meta_model(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="it has no model_type"):
        explain(meta_model(tmp_path))
    with pytest.raises(ModelError, match="is a file"):
        explain(meta_model(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text('{"model_type": "mixtrel"}', encoding="utf-8")
    with pytest.raises(ModelError, match="mixtrel"):
        explain(meta_model(tmp_path))


def test_explain_counts_bytes_without_reading_weights(qwen3_meta: PreTrainedModel) -> None:
    explanation = explain(qwen3_meta, expert_dtype="int4")
    assert [row.path for row in explanation.rows] == EXPERTS
    row = explanation.rows[0]
    floats = 8 * 3 * 32 * 16  # experts x matrices x hidden x intermediate
    assert row.weight_bytes == 2 * floats or row.weight_bytes == 4 * floats
    assert row.bytes_by_dtype["float32"] >= 4 * floats
    assert row.bytes_by_dtype["float32"] > row.bytes_by_dtype["bfloat16"] > row.bytes_by_dtype["int4"] > 0
    assert explanation.totals["int4"] == 3 * row.bytes_by_dtype["int4"]
    assert explanation.other_bytes > 0
    assert [name for name, _ in explanation.grouped()] == ["model.layers.0-2.mlp.experts"]


def test_careful_rules_keep_the_first_layers_precise(qwen3_meta: PreTrainedModel) -> None:
    assert {row.expert_dtype for row in explain(qwen3_meta, "careful", "int4").rows} == {"bfloat16"}


CONDITIONS: list[dict[str, Any]] = [
    {"name": r"\.mlp"},
    {"name": "layers", "layers": "0-1"},
    {"class": "Linear"},
    {"class": "*Experts"},
    {"layers": 2},
    {"name": r"self_attn\.[qk]"},
    {"class": ["Qwen3MoeAttention", "Qwen3MoeTopKRouter"]},
]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(CONDITIONS), st.booleans()), min_size=1, max_size=5),
)
def test_the_winner_is_the_first_rule_that_accepts_the_module(
    qwen3_meta: PreTrainedModel, chosen: list[tuple[dict[str, Any], bool]]
) -> None:
    rules = [rule(match, "default", recursive=recursive, optional=True) for match, recursive in chosen]
    found = paths(qwen3_meta, *rules)
    bound = read_rules(rules).rules
    for path, module in qwen3_meta.named_modules():
        names = tuple(cls.__name__ for cls in type(module).__mro__)
        around = [path.rsplit(".", depth)[0] for depth in range(1, path.count(".") + 1)]
        closed = any(outer in found and not chosen[found[outer]][1] for outer in around)
        first = next((index for index, one in enumerate(bound) if path and one.match.accepts(path, names)), None)
        assert found.get(path) == (None if closed else first)
