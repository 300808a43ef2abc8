"""Rule sets bound to operators: names and arguments are checked here, before any model is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hybrimoe.errors import ConfigError, RuleError
from hybrimoe.injection.operators import Kwargs, Operator, operator_named
from yaml_rules import shipped
from yaml_rules.errors import YamlRulesError
from yaml_rules.ktransformers import old_path, translate
from yaml_rules.loader import load_rules
from yaml_rules.located import KeyPath, Located
from yaml_rules.schema import Match, Rule, RuleSet
from yaml_rules.validation import messages

GENERIC = "moe"
"""The shipped rule set for every family without one of its own."""

RulesSource = str | Path | Located | list[Any] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BoundRule:
    """A rule with its operator and checked arguments.

    operator: None where a rule of KTransformers has no effect here (`note` says why). lenient: the rule may match
    nothing or be shadowed without being an error.
    """

    rule: Rule
    operator: Operator | None
    kwargs: Kwargs
    lenient: bool = False
    note: str = ""

    @property
    def match(self) -> Match:
        """The rule's conditions."""
        return self.rule.form.match

    @property
    def recursive(self) -> bool:
        """Whether modules inside a matched one are looked at; never inside replaced experts."""
        return self.rule.form.recursive and not (self.operator is not None and self.operator.replaces_experts)

    def where(self, path: KeyPath = ()) -> str:
        """`file:line: rule <index>`."""
        return self.rule.where(path)

    def paths(self, path: str) -> tuple[str, ...]:
        """The names under which this rule knows a module: KTransformers' rules also know the old ones."""
        from_ktransformers = self.rule.form.replace.class_ is not None
        return (path, old_path(path)) if from_ktransformers else (path,)

    def accepts(self, path: str, class_names: tuple[str, ...]) -> bool:
        """True where the rule is for a module with this path and these class names."""
        return any(self.match.accepts(name, class_names) for name in self.paths(path))


@dataclass(frozen=True, slots=True)
class BoundRules:
    """All rules of a source, in order of precedence."""

    source: str
    rules: tuple[BoundRule, ...]


def read_rules(rules: RulesSource, model_type: str | None = None) -> BoundRules:
    """Read rules and bind them to operators.

    rules: "auto" (the shipped set of `model_type`, else the generic one), a shipped name, a path, or inline rules.
    Raises RuleError that lists every mistake as `file:line: rule <index>: ...`.
    """
    source = auto_name(model_type) if isinstance(rules, str) and rules == "auto" else rules
    try:
        rule_set = load_rules(source)
    except YamlRulesError as error:
        raise RuleError(str(error)) from error
    return bind(rule_set)


def auto_name(model_type: str | None) -> str:
    """Name of the shipped rule set that "auto" stands for."""
    return model_type if model_type in shipped.names("rules") and model_type is not None else GENERIC


def bind(rule_set: RuleSet) -> BoundRules:
    """Look up each rule's operator and check its arguments. Raises RuleError that lists every mistake."""
    bound: list[BoundRule] = []
    mistakes: list[str] = []
    for rule in rule_set.rules:
        try:
            bound.append(_bind_one(rule))
        except (YamlRulesError, RuleError) as error:
            mistakes.append(str(error))
    if mistakes:
        raise RuleError("\n".join(mistakes))
    return BoundRules(rule_set.source, tuple(bound))


def _bind_one(rule: Rule) -> BoundRule:
    replace = rule.form.replace
    if replace.op is not None:
        operator = _operator(rule, replace.op)
        return BoundRule(rule, operator, _checked_kwargs(rule, operator, replace.kwargs))
    translation = translate(rule)
    if translation.op is None:
        return BoundRule(rule, None, Kwargs(), lenient=True, note=translation.note)
    operator = _operator(rule, translation.op)
    kwargs = _checked_kwargs(rule, operator, translation.kwargs)
    return BoundRule(rule, operator, kwargs, translation.lenient, translation.note)


def _operator(rule: Rule, name: str) -> Operator:
    try:
        return operator_named(name)
    except ConfigError as error:
        raise RuleError(f"{rule.where(('replace', 'op'))}: replace.op: {error}") from error


def _checked_kwargs(rule: Rule, operator: Operator, kwargs: Mapping[str, Any]) -> Kwargs:
    prefix = ("replace", "kwargs")
    try:
        return operator.kwargs.model_validate(dict(kwargs))
    except ValidationError as error:
        texts = messages(
            error,
            operator.kwargs,
            lambda path: rule.where((*prefix, *path)),
            lambda path: ".".join(map(str, (*prefix, *path))),
        )
        raise RuleError("\n".join(texts)) from error
