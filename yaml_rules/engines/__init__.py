"""What inference engines reach on a machine, as plain data: shares of data sheet rates, and their overheads."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from yaml_rules.errors import UnknownNameError
from yaml_rules.located import read_yaml
from yaml_rules.suggest import unknown

__all__ = ["engine_names", "load_engine"]

FOLDER = Path(__file__).parent


@cache
def engine_names() -> tuple[str, ...]:
    """Names of the shipped engines, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_engine(name: str) -> dict[str, Any]:
    """Mapping of a shipped engine. Raises YamlRulesError with the nearest name."""
    if name not in engine_names():
        raise UnknownNameError(unknown("engine", name, engine_names()))
    return dict(read_yaml(FOLDER / f"{name}.yaml").data)
