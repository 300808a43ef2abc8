"""Shipped hardware profiles as plain data; ``scheduler.HardwareProfile.from_mapping`` validates the values."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from yaml_rules.errors import UnknownNameError, YamlRulesError
from yaml_rules.located import read_yaml
from yaml_rules.suggest import unknown

__all__ = ["hardware_names", "load_hardware"]

FOLDER = Path(__file__).parent


@cache
def hardware_names() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_hardware(source: str | Path) -> dict[str, Any]:
    """Mapping of a profile given by shipped name or by file (YAML, or the JSON that ``hybrimoe calibrate`` writes).

    A shipped name wins over a file of the same name. Raises YamlRulesError with the nearest name.
    """
    text = str(source)
    path = FOLDER / f"{text}.yaml" if text in hardware_names() else Path(text).expanduser()
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise YamlRulesError(f"no hardware profile at {path}")
        raise UnknownNameError(unknown("hardware profile", text, hardware_names()))
    data = _read(path)
    if not isinstance(data, dict):
        raise YamlRulesError(f"{path}: a hardware profile is a mapping with cpu, accel, link and more")
    return data


def _read(path: Path) -> Any:
    if path.suffix != ".json":
        return read_yaml(path).data
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise YamlRulesError(f"{path}: not valid JSON ({error})") from error
