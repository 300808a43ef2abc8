"""Every error that HybriMoE raises on purpose, under one root, with the exit code that the CLI gives it."""

from __future__ import annotations

import os
from typing import ClassVar

from yaml_rules.suggest import did_you_mean, nearest, unknown

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "FileError",
    "HybriMoEError",
    "MissingExtraError",
    "ModelError",
    "PromptError",
    "RuleError",
    "ServerError",
    "UnsupportedExpertsError",
    "debugging",
    "did_you_mean",
    "nearest",
    "unknown",
]


def debugging() -> bool:
    """Whether HYBRIMOE_DEBUG is set, to anything but 0."""
    return os.environ.get("HYBRIMOE_DEBUG", "") not in ("", "0")


class HybriMoEError(Exception):
    """Root of the errors that say what was expected, what was found and what to do. The CLI prints only the message."""

    exit_code: ClassVar[int] = 1


class ConfigError(HybriMoEError, ValueError):
    """A deployment file, keyword or option that is not valid; wrong usage, so the CLI exits with 2."""

    exit_code: ClassVar[int] = 2


class RuleError(HybriMoEError, ValueError):
    """A rule file that does not parse, or a rule that does not fit the model."""


class ModelError(HybriMoEError):
    """A model or model directory that HybriMoE cannot use (no model, no experts, injected twice)."""


class UnsupportedExpertsError(ModelError):
    """An experts module whose layout or gate HybriMoE does not know; the message has the reason."""


class CheckpointError(HybriMoEError):
    """Weights on disk that are truncated, missing, of the wrong shape or dtype, or not finite."""


class DeviceError(HybriMoEError):
    """A device that does not exist here, or that cannot do what was asked."""


class BudgetError(HybriMoEError, ValueError):
    """A memory budget or slot count that cannot work."""


class PromptError(HybriMoEError, ValueError):
    """A prompt that cannot be generated from: empty, or longer than the context."""


class FileError(HybriMoEError):
    """A file or folder that a command was given and that cannot be read or written."""


class ServerError(HybriMoEError):
    """A running server that cannot be reached, that needs a key, or that refuses what it was asked."""


class MissingExtraError(HybriMoEError, ImportError):
    """An optional part was asked for and its packages are not installed."""

    def __init__(self, extra: str, reason: str = "") -> None:
        because = f" ({reason})" if reason else ""
        super().__init__(f"this needs the extra {extra!r}{because}; install it: pip install 'hybrimoe[{extra}]'")
        self.extra = extra
