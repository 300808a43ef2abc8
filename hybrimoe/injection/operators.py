"""The operators that rules can name: a registry of frozen records, with their arguments as pydantic models.

Rules never name an import path; what is not in the registry does not exist for them. To add an operator, write its
arguments as a model, say what `Application.apply` does with it, and call `register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hybrimoe.config.deploy import ExpertDtypeName
from hybrimoe.errors import ConfigError, unknown
from scheduler.plan import Placement


class Kwargs(BaseModel):
    """Base of operator arguments: unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpertsKwargs(Kwargs):
    """Arguments of the operators that replace experts."""

    expert_dtype: ExpertDtypeName | None = Field(
        default=None, description="How these experts are stored; default as in the deployment."
    )


class DefaultKwargs(Kwargs):
    """Arguments of `default`."""

    device: str | None = Field(
        default=None, description='Where the module runs: "cpu", "cuda:0", "xpu:0", ...; default where it is.'
    )
    missing: Literal["error", "stay"] = Field(
        default="error", description="What to do where the device is not here: refuse, or leave the module in place."
    )

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str | None) -> str | None:
        import torch

        if device is None:
            return None
        try:
            return str(torch.device(device))
        except RuntimeError as error:
            raise ConfigError(f'expected a device such as "cpu" or "cuda:0", found {device!r}') from error


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator: `placement` says that it replaces experts and where they run; None leaves the module in place."""

    name: str
    kwargs: type[Kwargs]
    summary: str
    placement: Placement | None = None

    @property
    def replaces_experts(self) -> bool:
        """True for operators that only fit experts modules."""
        return self.placement is not None


_registry: dict[str, Operator] = {}


def register(operator: Operator) -> None:
    """Add an operator under its name. Raises ConfigError where the name is taken."""
    if operator.name in _registry:
        raise ConfigError(f"an operator named {operator.name!r} is registered already")
    _registry[operator.name] = operator


def operators() -> Mapping[str, Operator]:
    """All registered operators by name."""
    return MappingProxyType(_registry)


def operator_named(name: str) -> Operator:
    """The operator of that name. Raises ConfigError with the nearest name."""
    if name not in _registry:
        raise ConfigError(unknown("operator", name, _registry))
    return _registry[name]


def kwargs_schemas() -> dict[str, dict[str, Any]]:
    """JSON Schema of each operator's arguments."""
    return {name: operator.kwargs.model_json_schema() for name, operator in sorted(_registry.items())}


def _register_shipped() -> None:
    experts: tuple[tuple[str, Placement, str], ...] = (
        ("hybrid_experts", "hybrid", "experts on CPU and accelerator, scheduled per step"),
        ("cpu_experts", "cpu", "experts on the CPU only"),
        ("accelerator_experts", "accelerator", "experts on the accelerator only, transferred when they are not there"),
    )
    for name, placement, summary in experts:
        register(Operator(name, ExpertsKwargs, summary, placement))
    register(Operator("default", DefaultKwargs, "the module as it is, optionally on another device"))


_register_shipped()
