"""JSON Schema of rule files, for editors: complete operator names and arguments while a rule is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yaml_rules.schema import RuleFileForm, RuleForm

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def rule_file_schema(operator_kwargs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """JSON Schema of a rule file in both forms.

    operator_kwargs: JSON Schema of the arguments of each operator, by its name.
    """
    schema = RuleFileForm.model_json_schema(by_alias=True)
    definitions = dict(schema.pop("$defs"))
    definitions["Replace"] = {"oneOf": [*_by_operator(operator_kwargs), _ktransformers_form()]}
    definitions["RuleFile"] = schema
    return {
        "$schema": DIALECT,
        "title": "HybriMoE rules",
        "anyOf": [
            {"type": "array", "minItems": 1, "items": {"$ref": f"#/$defs/{RuleForm.__name__}"}},
            {"$ref": "#/$defs/RuleFile"},
        ],
        "$defs": definitions,
    }


def _by_operator(operator_kwargs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "type": "object",
            "properties": {"op": {"const": name}, "kwargs": {"anyOf": [dict(kwargs), {"type": "null"}]}},
            "required": ["op"],
            "additionalProperties": False,
        }
        for name, kwargs in sorted(operator_kwargs.items())
    ]


def _ktransformers_form() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "KTransformers' form",
        "properties": {"class": {"type": "string"}, "kwargs": {"type": ["object", "null"]}},
        "required": ["class"],
        "additionalProperties": False,
    }
