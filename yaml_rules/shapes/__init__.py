"""Shipped model shapes, and shapes derived from any Hugging Face ``config.json``. Plain data in, plain data out."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from yaml_rules.errors import YamlRulesError
from yaml_rules.located import read_yaml
from yaml_rules.shapes.derive import derive_shape
from yaml_rules.suggest import unknown

__all__ = ["derive_shape", "load_shape", "shape_names"]

FOLDER = Path(__file__).parent


@cache
def shape_names() -> tuple[str, ...]:
    """Names of the shipped shapes, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_shape(source: str | Path) -> dict[str, Any]:
    """Mapping for ``scheduler.ModelShape.from_mapping``, from a shipped name, a config.json, its directory,
    or YAML.

    A shipped name wins over a file of the same name. Raises YamlRulesError with the nearest name, or with what the
    file lacks.
    """
    text = str(source)
    if text in shape_names():
        return _from_yaml(FOLDER / f"{text}.yaml")
    path = Path(text).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _from_yaml(path)
    if path.is_file():
        return derive_shape(_read_json(path), _name_of(path))
    if path.suffix or len(path.parts) > 1:
        raise YamlRulesError(f"no model shape at {path}: expected a config.json, its directory, or a shape in YAML")
    raise YamlRulesError(unknown("model shape", text, shape_names()))


def _name_of(path: Path) -> str:
    return path.resolve().parent.name if path.name == "config.json" else path.stem


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise YamlRulesError(f"{path}: expected the JSON of a model configuration ({error})") from error
    if not isinstance(data, dict):
        raise YamlRulesError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _from_yaml(path: Path) -> dict[str, Any]:
    data = read_yaml(path).data
    if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
        raise YamlRulesError(f"{path}: a model shape needs the keys name, source and config (the model's config.json)")
    extra = sorted(set(data) - {"name", "source", "config"})
    if extra:
        raise YamlRulesError(f"{path}: " + unknown("key", str(extra[0]), ("name", "source", "config")))
    return derive_shape(data["config"], str(data.get("name", path.stem)))
