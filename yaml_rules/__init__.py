"""YAML data of HybriMoE and the code that reads it: injection rules, deployment presets, hardware profiles, shapes.

Import the part that is needed: `yaml_rules.located` (safe YAML with line numbers), `yaml_rules.schema` (rule files),
`yaml_rules.shipped` (names and paths of the shipped files), `yaml_rules.hardware`, `yaml_rules.shapes`.
"""

from __future__ import annotations

from yaml_rules.errors import YamlRulesError
from yaml_rules.suggest import did_you_mean, nearest, unknown

__all__ = ["YamlRulesError", "did_you_mean", "nearest", "unknown"]
