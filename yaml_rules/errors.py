"""Errors of the YAML layer."""

from __future__ import annotations


class YamlRulesError(ValueError):
    """A YAML file (rules, deployment, hardware, shape) that cannot be used; the message names file and line."""
