"""`hybrimoe explain` and `hybrimoe rules`: tables, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.demo import demo_model_path
from tests.fake_device import DEVICE_TYPE, fake_cards
from yaml_rules import shipped

DEMO = json.loads((demo_model_path() / "config.json").read_text(encoding="utf-8"))
LAYERS, EXPERTS = DEMO["num_hidden_layers"], DEMO["num_local_experts"]
BAD = "- match: {nam: experts}\n  replace: {op: hybrid_experts}\n"


def test_explain_the_demo_model(hybrimoe: Any) -> None:
    outcome = hybrimoe("explain")
    assert outcome.code == 0
    assert f"model.layers.0-{LAYERS - 1}.mlp.experts" in outcome.out.replace("\n", "")
    assert "hybrid_experts int4" in outcome.out


def test_explain_as_json(hybrimoe: Any) -> None:
    outcome = hybrimoe("explain", "--rules", "cpu", "--dtype", "int8", "--json")
    assert outcome.code == 0
    data = outcome.data
    assert data["model_type"] == "qwen3_moe"
    assert len(data["rows"]) == LAYERS
    assert {(row["op"], row["expert_dtype"], row["n_experts"]) for row in data["rows"]} == {
        ("cpu_experts", "int8", EXPERTS)
    }
    assert data["totals"]["int8"] == sum(row["bytes_by_dtype"]["int8"] for row in data["rows"])


@pytest.mark.parametrize("accelerator", ["emulated", "none"])
def test_explain_says_what_memory_is_for(hybrimoe: Any, tmp_path: Path, accelerator: str) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text(f"accelerator: {accelerator}\nmemory: {{gpu_experts: 7}}\n", encoding="utf-8")
    data = hybrimoe("explain", "--config", file, "--dtype", "int8", "--json").data
    memory, record = data["memory"], data["totals"]["int8"] // (LAYERS * EXPERTS)
    assert memory["host"]["experts"] == data["totals"]["int8"]
    if accelerator == "none":
        assert memory["host"]["kv"] > 0
        assert memory["host"]["dense"] == data["other_bytes"]
    else:
        assert memory["emulated"]["slots"] == 7 * record
        assert memory["emulated"]["dense"] == data["other_bytes"]
    shown = " ".join(hybrimoe("explain", "--config", file, "--dtype", "int8").out.split())
    assert "weights around the experts" in shown
    assert ("keys and values" in shown) == (accelerator == "none")
    assert ("expert slots" in shown) == (accelerator == "emulated")


def test_explain_refuses_more_slots_than_experts(hybrimoe: Any, tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text("accelerator: emulated\nmemory: {gpu_experts: 7000}\n", encoding="utf-8")
    outcome = hybrimoe("explain", "--config", file)
    assert (outcome.code, "asked for 7000 expert slots" in outcome.err.replace("\n", " ")) == (1, True)


def test_explain_plans_a_card_without_loading(hybrimoe: Any, tmp_path: Path) -> None:
    """Of a card that is here: its parts, and as many slots as its memory has room for beside them."""
    file = tmp_path / "deploy.yaml"
    file.write_text(f"accelerator: '{DEVICE_TYPE}:0'\n", encoding="utf-8")
    with fake_cards(1, card_bytes=(512 << 20) + (16 << 20), workspace_bytes=8_519_680):
        data = hybrimoe("explain", "--config", file, "--dtype", "bfloat16", "--json").data
    parts = data["memory"][f"{DEVICE_TYPE}:0"]
    assert parts["workspaces"] + parts["graphs"] + parts["reserve"] == 512 << 20
    assert parts["workspaces"] == 8_519_680
    record = data["totals"]["bfloat16"] // (LAYERS * EXPERTS)
    total = sum(n_bytes for name, n_bytes in parts.items() if name != "staging")
    assert parts["slots"] > 0
    assert total <= (512 << 20) + (16 << 20) < total + record


def test_explain_every_module(hybrimoe: Any) -> None:
    outcome = hybrimoe("explain", "--all")
    assert outcome.out.count("hybrid_experts") == LAYERS


def test_explain_what_is_no_model(hybrimoe: Any, tmp_path: Path) -> None:
    outcome = hybrimoe("explain", tmp_path)
    assert outcome.code == 1
    assert "no config.json" in outcome.err.replace("\n", " ")
    assert outcome.out == ""


def test_rules_check(hybrimoe: Any, tmp_path: Path) -> None:
    assert hybrimoe("rules", "check", "moe").code == 0
    path = tmp_path / "bad.yaml"
    path.write_text(BAD, encoding="utf-8")
    outcome = hybrimoe("rules", "check", path)
    assert outcome.code == 1
    assert f"{path}:1: rule 0: unknown key 'match.nam'; did you mean 'name'" in outcome.err.replace("\n", "")
    found = hybrimoe("rules", "check", path, "--json")
    assert (found.code, "rule 0" in found.data["error"]["message"]) == (1, True)


def test_rules_check_on_a_model(hybrimoe: Any, tmp_path: Path) -> None:
    good = hybrimoe("rules", "check", "careful", "--model", demo_model_path(), "--json")
    assert (good.data["ok"], good.data["modules"], good.data["experts"]) == (True, LAYERS, LAYERS * EXPERTS)
    path = tmp_path / "nothing.yaml"
    path.write_text(BAD.replace("nam:", "name:").replace("experts}", "xperts_}", 1), encoding="utf-8")
    assert hybrimoe("rules", "check", path).code == 0
    outcome = hybrimoe("rules", "check", path, "--model", demo_model_path())
    assert (outcome.code, "no module's name matches" in outcome.err) == (1, True)


def test_rules_list_as_a_table(hybrimoe: Any) -> None:
    outcome = hybrimoe("rules", "list")
    assert outcome.code == 0
    for kind in ("rules", "deploy"):
        assert all(name in outcome.out for name in shipped.names(kind))


def test_rules_list_and_show(hybrimoe: Any) -> None:
    listed = hybrimoe("rules", "list", "--json").data
    assert {entry["name"] for entry in listed if entry["kind"] == "rules"} == set(shipped.names("rules"))
    assert all(entry["summary"] for entry in listed)
    assert "hybrid_experts" in hybrimoe("rules", "show", "moe").out
    shown = hybrimoe("rules", "show", "careful", "--json").data
    assert [rule["replace"]["op"] for rule in shown] == ["hybrid_experts"] * 2


@pytest.mark.parametrize("words", [(), ("--deploy",)])
def test_rules_schema_accepts_every_shipped_file(hybrimoe: Any, words: tuple[str, ...]) -> None:
    import jsonschema

    from yaml_rules.located import read_yaml

    schema = hybrimoe("rules", "schema", *words).data
    validator = jsonschema.Draft202012Validator(schema)
    kind = "deploy" if words else "rules"
    for name in shipped.names(kind):
        assert list(validator.iter_errors(read_yaml(shipped.path_of(kind, name)).data)) == []
    wrong = {"modle": "x"} if words else [{"match": {"name": "x"}, "replace": {"op": "hybrid_expert"}}]
    assert list(validator.iter_errors(wrong))
