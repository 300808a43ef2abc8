"""Injection: YAML rules replace modules of a loaded (or meta) transformers model, and `restore` puts them back."""

from __future__ import annotations

from hybrimoe.injection.explain import Explanation, explain
from hybrimoe.injection.inject import inject
from hybrimoe.injection.injection import Injection
from hybrimoe.injection.operators import Operator, operators, register
from hybrimoe.injection.resolve import Hit, Resolution, resolve
from hybrimoe.injection.rules import BoundRules, read_rules

__all__ = [
    "BoundRules",
    "Explanation",
    "Hit",
    "Injection",
    "Operator",
    "Resolution",
    "explain",
    "inject",
    "operators",
    "read_rules",
    "register",
    "resolve",
]
