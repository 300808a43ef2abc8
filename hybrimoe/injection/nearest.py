"""Says why a rule matches nothing, with the nearest module, class or layer of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hybrimoe.errors import nearest
from hybrimoe.injection.rules import BoundRule
from yaml_rules.layers import layer_of

Described = tuple[str, tuple[str, ...]]  # a module's path, and the names of its class and base classes

_META_CHARACTERS = re.compile(r"\\[dwsbDWSB]|\(\?[^)]*\)|[\^$\\()\[\]?+*|{}]")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def why_nothing_matches(rule: BoundRule, modules: Sequence[Described]) -> str:
    """One sentence: which condition fails, and what comes nearest to it."""
    match = rule.match
    by_name = [module for module in modules if any(match.accepts_name(name) for name in rule.paths(module[0]))]
    by_class = [module for module in modules if match.accepts_class(module[1])]
    if not by_name:
        return f"no module's name matches {match.name!r}{_nearest_path(match.name or '', modules)}"
    if not by_class:
        return f"no module is a {' or '.join(match.class_ or [])}{_nearest_class(match.class_ or [], modules)}"
    both = [module for module in by_name if module in by_class]
    if not both:
        found = _short_list(names[0] for _, names in by_name)
        return (
            f"the modules whose name matches {match.name!r} are no {' or '.join(match.class_ or [])}; they are {found}"
        )
    layers = sorted({layer for path, _ in both if (layer := layer_of(path)) is not None})
    if not layers:
        return f"the modules that match otherwise, such as {both[0][0]}, belong to no layer"
    return f"no matching module is in these layers; it would match in layers {layers[0]}-{layers[-1]}"


def _nearest_path(pattern: str, modules: Sequence[Described]) -> str:
    """The module path that looks most like the pattern without its special characters."""
    literal = ".".join(part for part in _META_CHARACTERS.sub("", pattern).split(".") if part)
    by_template = {_INDEX.sub("", path).replace("..", "."): path for path, _ in reversed(modules)}
    found = nearest(literal, by_template) or nearest(literal.rsplit(".", 1)[-1], _by_leaf(modules))
    if not found:
        return ""
    return f"; the nearest module is {by_template.get(found[0]) or _by_leaf(modules)[found[0]]}"


def _by_leaf(modules: Sequence[Described]) -> dict[str, str]:
    return {path.rsplit(".", 1)[-1]: path for path, _ in reversed(modules)}


def _nearest_class(wanted: Sequence[str], modules: Sequence[Described]) -> str:
    known = {names[0] for _, names in modules}
    for name in wanted:
        found = nearest(name.rsplit(".", 1)[-1].strip("*?"), known)
        if found:
            return f"; the nearest class is {found[0]}"
    return ""


def _short_list(names: Iterable[str]) -> str:
    unique = sorted(set(names))
    return ", ".join(unique[:5]) + (", ..." if len(unique) > 5 else "")
