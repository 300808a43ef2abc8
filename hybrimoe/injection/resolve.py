"""Which rule is for which module of a model. Works on the meta device: only names, classes and shapes are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from hybrimoe.errors import ModelError, RuleError, UnsupportedExpertsError
from hybrimoe.experts.layout import ExpertsLayout, find_experts, is_experts, read, seen_by_text
from hybrimoe.injection.nearest import why_nothing_matches
from hybrimoe.injection.rules import BoundRule, BoundRules


@dataclass(frozen=True, slots=True)
class Hit:
    """A module and the rule that is for it; `layout` where the rule replaces experts."""

    path: str
    module: nn.Module = field(repr=False)
    rule: BoundRule = field(repr=False)
    layout: ExpertsLayout | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Resolution:
    """All hits in the order of the model's modules, the experts hits in the order of execution, and remarks."""

    source: str
    hits: tuple[Hit, ...]
    experts: tuple[Hit, ...]
    untouched_experts: tuple[str, ...]
    remarks: tuple[str, ...]


def claimed_modules(hits: Iterable[Hit]) -> frozenset[int]:
    """Ids of the modules that a rule with an effect is for."""
    return frozenset(id(hit.module) for hit in hits if hit.rule.operator is not None)


@dataclass(slots=True)
class _Walk:
    """What a pass over the modules found out, by position of the rule."""

    hits: list[tuple[str, nn.Module, int]] = field(default_factory=list)
    matched: set[int] = field(default_factory=set)
    won: set[int] = field(default_factory=set)
    taken_by: dict[int, tuple[int, str]] = field(default_factory=dict)


def resolve(model: nn.Module, rules: BoundRules) -> Resolution:
    """Find the rule of each module; the first one that matches wins.

    Raises ModelError for a dense model, UnsupportedExpertsError for experts that cannot be read, RuleError (with file,
    line, rule index and the nearest right name) for a rule that matches nothing, is shadowed by earlier ones, or puts
    an experts operator on a module that holds no experts.
    """
    _refuse_dense(model, rules)
    modules = [(path, module) for path, module in seen_by_text(model) if path]
    walk = _walk(modules, rules.rules)
    remarks = _check_every_rule(walk, modules, rules.rules)
    hits = tuple(_hit(path, module, rules.rules[index], modules) for path, module, index in walk.hits)
    order = {path: index for index, (path, _) in enumerate(find_experts(model))}
    experts = sorted((hit for hit in hits if hit.layout is not None), key=lambda hit: order.get(hit.path, len(order)))
    untouched = tuple(path for path in order if path not in {hit.path for hit in experts})
    return Resolution(rules.source, hits, tuple(experts), untouched, remarks)


def class_names(module: nn.Module) -> tuple[str, ...]:
    """Name of the module's class and of its base classes, nearest first."""
    return tuple(cls.__name__ for cls in type(module).__mro__ if cls is not object)


def _refuse_dense(model: nn.Module, rules: BoundRules) -> None:
    wants_experts = any(rule.operator is not None and rule.operator.replaces_experts for rule in rules.rules)
    if wants_experts and not find_experts(model):
        raise ModelError(
            f"{type(model).__name__} has no experts: HybriMoE schedules Mixture-of-Experts models, and this one is"
            " dense. Use it with transformers as it is"
        )


def _walk(modules: Iterable[tuple[str, nn.Module]], rules: tuple[BoundRule, ...]) -> _Walk:
    walk = _Walk()
    closed: dict[str, int] = {}
    for path, module in modules:
        names = class_names(module)
        accepting = [index for index, rule in enumerate(rules) if rule.accepts(path, names)]
        walk.matched.update(accepting)
        blocker = _closed_by(path, closed)
        winner = blocker if blocker is not None else (accepting[0] if accepting else None)
        for index in accepting:
            if winner is not None and index != winner:
                walk.taken_by.setdefault(index, (winner, path))
        if winner is None or blocker is not None:
            continue
        walk.won.add(winner)
        walk.hits.append((path, module, winner))
        if not rules[winner].recursive:
            closed[path] = winner
    return walk


def _closed_by(path: str, closed: dict[str, int]) -> int | None:
    """Position of the rule that matched a module around `path` and lets no rule inside it."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        index = closed.get(".".join(parts[:end]))
        if index is not None:
            return index
    return None


def _check_every_rule(
    walk: _Walk, modules: list[tuple[str, nn.Module]], rules: tuple[BoundRule, ...]
) -> tuple[str, ...]:
    """Remarks about rules without effect; raises RuleError for those that must have one."""
    mistakes: list[str] = []
    remarks: list[str] = []
    for index, rule in enumerate(rules):
        if index in walk.won:
            if rule.note:
                remarks.append(f"{rule.where()}: {rule.note}")
            continue
        if index in walk.matched:
            winner, path = walk.taken_by[index]
            taker = rules[winner].where()
            text = f"{rule.where()} is shadowed: earlier rules take all its modules ({path}: by {taker})"
            overridden = rule.rule.inherited and not rules[winner].rule.inherited
        else:
            described = [(path, class_names(module)) for path, module in modules]
            text = f"{rule.where(('match',))}: match: {why_nothing_matches(rule, described)}"
            overridden = False
        forgiven = rule.lenient or rule.rule.form.optional or overridden
        (remarks if forgiven else mistakes).append(text)
    if mistakes:
        raise RuleError("\n".join(mistakes))
    return tuple(remarks)


def _hit(path: str, module: nn.Module, rule: BoundRule, modules: list[tuple[str, nn.Module]]) -> Hit:
    if rule.operator is None or not rule.operator.replaces_experts:
        return Hit(path, module, rule)
    try:
        return Hit(path, module, rule, read(module))
    except UnsupportedExpertsError as error:
        if is_experts(module):
            raise UnsupportedExpertsError(f"{rule.where()}: {path}: {error}") from error
        experts = [(other, candidate) for other, candidate in modules if is_experts(candidate)]
        inside = [f"{other} ({type(candidate).__name__})" for other, candidate in experts if other.startswith(path)]
        near = inside or [f"{other} ({type(candidate).__name__})" for other, candidate in experts]
        raise RuleError(
            f"{rule.where()}: {rule.operator.name} is for experts, and {path} ({type(module).__name__}) holds none;"
            f" the nearest one is {near[0]}"
        ) from error
