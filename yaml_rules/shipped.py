"""Names and paths of the YAML files that ship in this package."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from yaml_rules.errors import YamlRulesError
from yaml_rules.suggest import unknown

Kind = Literal["rules", "deploy"]


def folder(kind: Kind) -> Path:
    """Folder of the shipped files of one kind."""
    return Path(str(files("yaml_rules"))) / kind


@cache
def names(kind: Kind) -> tuple[str, ...]:
    """Names (file stems) of the shipped files of one kind, sorted."""
    return tuple(sorted(file.stem for file in folder(kind).glob("*.yaml")))


def path_of(kind: Kind, name: str) -> Path:
    """Path of a shipped file; an unknown name raises YamlRulesError with the nearest one."""
    if name not in names(kind):
        what = "rule set" if kind == "rules" else "deployment preset"
        raise YamlRulesError(unknown(what, name, names(kind)))
    return folder(kind) / f"{name}.yaml"


def find(kind: Kind, name_or_path: str | Path) -> Path:
    """Path of a YAML file given by shipped name or by path.

    A shipped name wins over a file of the same name; write "./name" for the file. Raises YamlRulesError where it is
    neither, with the nearest shipped name.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, str) and text in names(kind):
        return path_of(kind, text)
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.is_dir():
        raise YamlRulesError(
            f"{path}: " + ("expected a YAML file, found a directory" if path.is_dir() else "no such file")
        )
    return path_of(kind, text)


def summary(kind: Kind, name: str) -> str:
    """What a shipped file is for: the first sentence of the comment at its top."""
    lines = path_of(kind, name).read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).split(". ")[0].rstrip(".")
