"""The examples of docs/rules.md and docs/config.md are valid, and their tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hybrimoe.config.deploy import DeployConfig, load_config
from hybrimoe.injection import operators, read_rules
from yaml_rules import shipped
from yaml_rules.loader import load_rules

DOCS = Path(__file__).parents[3] / "docs"
EXAMPLE = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


def examples(page: str) -> list[str]:
    found = EXAMPLE.findall((DOCS / page).read_text(encoding="utf-8"))
    assert found, f"{page} has no example"
    return found


@pytest.mark.parametrize("text", examples("rules.md"))
def test_rule_examples_are_valid(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_rules(path).rules


@pytest.mark.parametrize("text", examples("config.md"))
def test_configuration_examples_are_valid(text: str, tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(text, encoding="utf-8")
    rules = load_config(path).located_rules()
    assert load_rules("moe" if rules == "auto" else rules).rules


def test_the_tables_name_everything() -> None:
    rules, config = ((DOCS / page).read_text(encoding="utf-8") for page in ("rules.md", "config.md"))
    assert [name for name in operators() if f"| `{name}` |" not in rules] == []
    assert [name for name in shipped.names("deploy") if f"| `{name}` |" not in config] == []
    assert [name for name in DeployConfig.model_fields if f"\n### {name}\n" not in config] == []


def test_every_policy_is_in_the_page() -> None:
    from scheduler.planner.policies import POLICIES

    config = (DOCS / "config.md").read_text(encoding="utf-8")
    assert [name for name in POLICIES if f"`{name}`" not in config] == []
