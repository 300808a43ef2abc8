"""The form of a rule file (version 1), as models, and the rules that come out of it.

A file is a list of rules, or a mapping with `version: 1`, `extends:` and `rules:`. What a rule names (operators, their
kwargs) is checked where the operators are known; here only its form is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    WithJsonSchema,
    model_validator,
)

from yaml_rules.layers import layer_of, parse_layers
from yaml_rules.located import KeyPath, Located

SCHEMA_VERSION = 1


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        at = "" if error.pos is None else f" at character {error.pos}"
        raise ValueError(f"{pattern!r} is no regular expression: {error.msg}{at}") from error
    return pattern


def _is_no_bool(value: object) -> object:
    """For numbers: `true` equals 1 in Python."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {value}")
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


_LAYERS_JSON = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string", "pattern": r"^\s*\d+\s*(-\s*\d+\s*)?(,\s*\d+\s*(-\s*\d+\s*)?)*$"},
            {"type": "integer", "minimum": 0},
            {"type": "array", "minItems": 1},
        ]
    }
)
_NAMES_JSON = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Match(_Form):
    """Which modules a rule is for; all conditions that are given must hold."""

    name: Annotated[str, AfterValidator(_check_pattern)] | None = Field(
        default=None, description="Regular expression, searched (re.search) in the module's path."
    )
    class_: Annotated[list[str], BeforeValidator(_as_list), _NAMES_JSON] | None = Field(
        default=None,
        alias="class",
        description="Class name, or several; * and ? are wildcards; a dotted path counts by its last part.",
    )
    layers: Annotated[tuple[tuple[int, int], ...], BeforeValidator(parse_layers), _LAYERS_JSON] | None = Field(
        default=None, description='Layer indices: "0-29", "0,2,5-9", 7.'
    )

    @model_validator(mode="after")
    def _has_a_condition(self) -> Match:
        if self.name is None and not self.class_ and self.layers is None:
            raise ValueError("expected at least one of name, class, layers; found none")
        return self

    def accepts(self, path: str, class_names: tuple[str, ...]) -> bool:
        """True for a module with this path whose class, or a base class of it, has one of these names."""
        return self.accepts_name(path) and self.accepts_class(class_names) and self.accepts_layer(path)

    def accepts_name(self, path: str) -> bool:
        """True where `name` is not given or is found in the path."""
        return self.name is None or re.search(self.name, path) is not None

    def accepts_class(self, class_names: tuple[str, ...]) -> bool:
        """True where `class` is not given or one of the names fits; `class_names` holds the class and its bases."""
        if self.class_ is None:
            return True
        patterns = [name.rsplit(".", 1)[-1] for name in self.class_]
        return any(fnmatchcase(name, pattern) for name in class_names for pattern in patterns)

    def accepts_layer(self, path: str) -> bool:
        """True where `layers` is not given or holds the layer index in the path."""
        if self.layers is None:
            return True
        layer = layer_of(path)
        return layer is not None and any(first <= layer <= last for first, last in self.layers)


class Replace(_Form):
    """What takes the module's place."""

    op: str | None = Field(default=None, min_length=1, description="Name of a registered operator.")
    class_: str | None = Field(
        default=None,
        alias="class",
        min_length=1,
        description="KTransformers' form: a class path that maps to an operator.",
    )
    device: str | None = Field(
        default=None,
        description="Beside class only: where KTransformers first puts the module; kwargs say where it runs.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the operator.")

    @model_validator(mode="before")
    @classmethod
    def _empty_kwargs(cls, data: Any) -> Any:
        return {**data, "kwargs": {}} if isinstance(data, Mapping) and data.get("kwargs", ...) is None else data

    @model_validator(mode="after")
    def _names_one_operator(self) -> Replace:
        if (self.op is None) == (self.class_ is None):
            found = "neither" if self.op is None else "both"
            raise ValueError(f"expected either op or class (KTransformers' form), found {found}")
        if self.device is not None and self.op is not None:
            raise ValueError(
                "device stands beside class only (KTransformers' form); beside op write kwargs: {device: ...}"
            )
        return self


class RuleForm(_Form):
    """One rule."""

    match: Match = Field(description="Which modules.")
    replace: Replace = Field(description="What takes their place.")
    recursive: StrictBool = Field(default=True, description="Whether modules inside a matched one are looked at.")
    optional: StrictBool = Field(default=False, description="Whether the rule may match nothing.")


class RuleFileForm(_Form):
    """A rule file in its mapping form."""

    version: Annotated[Literal[1], BeforeValidator(_is_no_bool)] = Field(description="Version of the format; 1.")
    extends: Annotated[list[str], BeforeValidator(_as_list), _NAMES_JSON] = Field(
        default_factory=list, description="Shipped rule sets or files whose rules follow after these."
    )
    rules: list[RuleForm] = Field(default_factory=list, description="First match wins.")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule with its place: `index` counts from 0 in its file, `inherited` where it came through `extends`."""

    index: int
    form: RuleForm
    located: Located = field(repr=False)
    inherited: bool = False

    def where(self, path: KeyPath = ()) -> str:
        """`file:line: rule <index>` of the rule or of a key inside it."""
        return f"{self.located.where(path)}: rule {self.index}"


@dataclass(frozen=True, slots=True)
class RuleSet:
    """The rules of a file and of all that it extends, in order of precedence."""

    source: str
    rules: tuple[Rule, ...]
