"""Rule files: both forms, extends, conditions, and mistakes of form with file, line and rule index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from yaml_rules.errors import YamlRulesError
from yaml_rules.layers import layer_of, parse_layers
from yaml_rules.loader import load_rules
from yaml_rules.schema import Match, RuleSet
from yaml_rules.suggest import did_you_mean, nearest, unknown

RULE = "- match: {name: experts}\n  replace: {op: hybrid_experts}\n"


def load(folder: Path, text: str) -> RuleSet:
    path = folder / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return load_rules(path)


def test_a_list_and_a_mapping_are_the_same(tmp_path: Path) -> None:
    listed = load(tmp_path, RULE).rules[0]
    mapped = load(tmp_path, "version: 1\nrules:\n" + RULE).rules[0]
    assert listed.form == mapped.form
    assert listed.where() == f"{tmp_path / 'rules.yaml'}:1: rule 0"
    assert mapped.where(("replace", "op")) == f"{tmp_path / 'rules.yaml'}:4: rule 0"
    assert (listed.form.recursive, listed.form.optional) == (True, False)


def test_own_rules_come_before_extended_ones(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 1\nextends: moe\nrules:\n" + RULE, encoding="utf-8")
    rules = load(tmp_path, "version: 1\nextends: [base.yaml, cpu]\nrules:\n" + RULE.replace("hybrid", "cpu")).rules
    assert [rule.form.replace.op for rule in rules] == [
        "cpu_experts", "hybrid_experts", "hybrid_experts", "cpu_experts",
    ]  # fmt: skip
    assert [rule.inherited for rule in rules] == [False, True, True, True]
    assert [Path(rule.located.source).name for rule in rules] == ["rules.yaml", "base.yaml", "moe.yaml", "cpu.yaml"]


def test_a_circle_of_extends_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("version: 1\nextends: rules.yaml\n", encoding="utf-8")
    with pytest.raises(YamlRulesError, match=r"a.yaml:2: extends: .*rules.yaml -> .*a.yaml -> rules.yaml is a circle"):
        load(tmp_path, "version: 1\nextends: a.yaml\n")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (RULE.replace("name", "nam"), 1, "rule 0: unknown key 'match.nam'; did you mean 'name'"),
        (RULE + RULE.replace("op:", "opp:"), 4, "rule 1: unknown key 'replace.opp'; did you mean 'op'"),
        (RULE + "  recursve: true\n", 3, "rule 0: unknown key 'recursve'; did you mean 'recursive'"),
        (RULE + "  optional: perhaps\n", 3, "rule 0: optional: .*found 'perhaps'"),
        (RULE.replace("experts}", '"a("}', 1), 1, "rule 0: match.name: 'a\\(' is no regular expression"),
        ("- match: {layers: 9-3}\n  replace: {op: x}\n", 1, "write 3-9"),
        ("- match: {layers: -1}\n  replace: {op: x}\n", 1, "match.layers: expected layers such as"),
        ("- match: {layers: a-b}\n  replace: {op: x}\n", 1, "match.layers: expected layers such as"),
        ("- match: {}\n  replace: {op: x}\n", 1, "expected at least one of name, class, layers"),
        ("- match: {name: a}\n", 1, "rule 0: replace: this key is required"),
        ("- match: {name: a}\n  replace: {}\n", 2, "either op or class .* found neither"),
        ("- match: {name: a}\n  replace: {op: x, class: y}\n", 2, "either op or class .* found both"),
        ("- match: {name: a}\n  replace: {op: x, kwargs: 3}\n", 2, "replace.kwargs: .*dictionary, found 3"),
        ("- 3\n", 1, "rule 0: rule: .*found 3"),
        ("version: 2\nrules: []\n", 1, "version: should be 1, found 2"),
        ("rules:\n" + RULE, 1, "version: this key is required"),
        (
            RULE + "  recursive: 'False'\n",
            3,
            "rule 0: recursive: .*boolean, found 'False'; write false, without quotes",
        ),
        (RULE + "  optional: 1\n", 3, "rule 0: optional: .*boolean, found 1"),
        ("version: true\nextends: moe\n", 1, "version: expected a number, found True"),
        ("version: 1\nextend: moe\n", 2, "unknown key 'extend'; did you mean 'extends'"),
        ("version: 1\nrules: 3\n", 2, "rules: expected a list, found int"),
        ("version: 1\nextends: moo\n", 2, "extends: unknown rule set 'moo'; did you mean 'moe'"),
        ("version: 1\n", 1, "expected rules: or extends:"),
        ("[]\n", 1, "expected a list of rules .* found nothing"),
        ("just text\n", 1, "found str"),
    ],
)
def test_mistakes_of_form_name_file_line_and_rule(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(YamlRulesError, match=message) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'rules.yaml'}:{line}: ")


def test_all_mistakes_are_listed(tmp_path: Path) -> None:
    with pytest.raises(YamlRulesError) as caught:
        load(tmp_path, RULE.replace("name", "nam") + RULE + RULE.replace("op:", "opp:"))
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["rule 0", "rule 2"]


@pytest.mark.parametrize(
    ("match", "path", "classes", "accepted"),
    [
        ({"name": "experts"}, "model.layers.0.mlp.experts", ("X",), True),
        ({"name": "^experts"}, "model.layers.0.mlp.experts", ("X",), False),
        ({"class": "torch.nn.Linear"}, "a", ("Linear", "Module"), True),
        ({"class": "Linear"}, "a", ("MyLinear", "Linear", "Module"), True),
        ({"class": "*Experts"}, "a", ("MixtralExperts", "Module"), True),
        ({"class": ["A", "B"]}, "a", ("B", "Module"), True),
        ({"class": "Experts"}, "a", ("MixtralExperts", "Module"), False),
        ({"layers": "0-2,5"}, "model.layers.5.mlp", ("X",), True),
        ({"layers": "0-2,5"}, "model.layers.15.mlp", ("X",), False),
        ({"layers": 3}, "model.norm", ("X",), False),
        ({"name": "mlp", "class": "X", "layers": 1}, "model.layers.1.mlp", ("X",), True),
        ({"name": "mlp", "class": "X", "layers": 1}, "model.layers.1.mlp", ("Y",), False),
    ],
)
def test_conditions(match: dict[str, Any], path: str, classes: tuple[str, ...], accepted: bool) -> None:
    assert Match.model_validate(match).accepts(path, classes) is accepted


def test_layers() -> None:
    assert parse_layers("0-29") == ((0, 29),)
    assert parse_layers(" 1, 3 - 5 ") == ((1, 1), (3, 5))
    assert parse_layers([0, "7-8"]) == ((0, 0), (7, 8))
    assert layer_of("model.layers.12.mlp.experts.3") == 12
    assert layer_of("lm_head") is None


def test_suggestions() -> None:
    assert nearest("Hybrid_expert", ["default", "hybrid_experts"]) == ["hybrid_experts"]
    assert did_you_mean("xyz", ["default"]) == ""
    assert unknown("operator", "defalt", ["default"]) == (
        "unknown operator 'defalt'; did you mean 'default'? (known: default)"
    )
