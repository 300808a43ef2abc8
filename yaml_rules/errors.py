"""Errors of the YAML layer."""

from __future__ import annotations


class YamlRulesError(ValueError):
    """A YAML file (rules, deployment, hardware, shape) that cannot be used; the message names file and line."""


class UnknownNameError(YamlRulesError):
    """A name that none of the shipped files has: wrong usage, so the CLI exits with 2."""

    exit_code = 2
