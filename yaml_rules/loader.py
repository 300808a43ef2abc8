"""Reads rule files: by shipped name, path or inline data, with everything they extend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from yaml_rules import shipped
from yaml_rules.errors import YamlRulesError
from yaml_rules.located import KeyPath, Located, read_yaml
from yaml_rules.schema import SCHEMA_VERSION, Rule, RuleFileForm, RuleForm, RuleSet
from yaml_rules.validation import messages


def load_rules(source: str | Path | Located | list[Any] | Mapping[str, Any]) -> RuleSet:
    """Read a rule set and what it extends; own rules come first.

    source: shipped name, path, or inline rules (a list, a mapping with `version: 1`, or Located data of either).
    Raises YamlRulesError that lists every mistake of form as `file:line: rule <index>: ...`.
    """
    located = _read(source)
    return RuleSet(located.source, _load(located, ()))


def _read(source: str | Path | Located | list[Any] | Mapping[str, Any]) -> Located:
    if isinstance(source, Located):
        return source
    if isinstance(source, str | Path):
        return read_yaml(shipped.find("rules", source))
    return Located(source, "<rules>")


def _load(located: Located, chain: tuple[str, ...]) -> tuple[Rule, ...]:
    extends, own = _parse(located)
    inherited: list[Rule] = []
    for index, name in enumerate(extends):
        place = located.where(("extends", index))
        parent = _parent(name, located, place)
        if parent.source in (*chain, located.source):
            raise YamlRulesError(f"{place}: extends: {' -> '.join((*chain, located.source, name))} is a circle")
        rules = _load(parent, (*chain, located.source))
        inherited.extend(replace(rule, inherited=True) for rule in rules)
    return (*own, *inherited)


def _parent(name: str, located: Located, place: str) -> Located:
    """A parent by shipped name, or by path from the file's folder."""
    beside = Path(located.source).parent / name
    try:
        return read_yaml(beside if beside.is_file() else shipped.find("rules", name))
    except YamlRulesError as error:
        raise YamlRulesError(f"{place}: extends: {error}") from error


def _parse(located: Located) -> tuple[list[str], list[Rule]]:
    data = located.data
    if isinstance(data, list) and data:
        return [], _parse_rules(located, ())
    if not isinstance(data, Mapping):
        found = type(data).__name__ if data else "nothing"
        raise YamlRulesError(f"{located.where()}: expected a list of rules or a mapping with rules:, found {found}")
    extends = _parse_head(located)
    rules = _parse_rules(located, ("rules",)) if data.get("rules") else []
    if not rules and not extends:
        raise YamlRulesError(f"{located.where()}: expected rules: or extends:, found none")
    return extends, rules


def _parse_head(located: Located) -> list[str]:
    """Checks the mapping's own keys; the rules are checked one by one after it."""
    head = {key: value for key, value in located.data.items() if key != "rules"}
    found = located.data.get("rules")
    if not isinstance(found, list | None):
        raise YamlRulesError(f"{located.where(('rules',))}: rules: expected a list, found {type(found).__name__}")
    if "version" not in head:
        raise YamlRulesError(f"{located.where()}: version: this key is required; write version: {SCHEMA_VERSION}")
    try:
        return RuleFileForm.model_validate(head).extends
    except ValidationError as error:
        raise YamlRulesError("\n".join(messages(error, RuleFileForm, located.where, _dotted))) from error


def _parse_rules(located: Located, prefix: KeyPath) -> list[Rule]:
    rules: list[Rule] = []
    mistakes: list[str] = []
    for index in range(len(located.sub(prefix).data)):
        part = located.sub((*prefix, index))
        try:
            rules.append(Rule(index, RuleForm.model_validate(part.data), part))
        except ValidationError as error:
            places = messages(error, RuleForm, _placed(part, index), _dotted)
            mistakes.extend(places)
    if mistakes:
        raise YamlRulesError("\n".join(mistakes))
    return rules


def _placed(part: Located, index: int) -> Any:
    return lambda path: f"{part.where(path)}: rule {index}"


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path)) or "rule"
