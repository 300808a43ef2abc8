"""A policy as command lines and deployment files name it: `NAME`, `FILE.py`, or either with parameters.

`ours`, `hybrimoe/impact/lru`, `hybrimoe:alpha=0.3`, `mine.py`, `mine.py:alpha=0.1`, and `mine.py::second` where a file
has several. Names are HybriMoE's own, or those that an installed package brings: its entry points in the group
`hybrimoe.policies` name modules that use `scheduler.extension.policy`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from hybrimoe.errors import ConfigError
from scheduler.errors import PolicyError, SchedulerError
from scheduler.extension import Extension, extensions
from scheduler.planner.policies import resolve_policy
from scheduler.simulator.simulator import SimulationConfig
from yaml_rules.errors import YamlRulesError
from yaml_rules.located import plain_value

GROUP = "hybrimoe.policies"
FILE_SPEC = re.compile(r"(?P<file>.+?\.py)(?:::(?P<name>[^:]+))?(?::(?P<rest>.*))?", re.DOTALL)


class PolicyImportWarning(UserWarning):
    """An entry point of `hybrimoe.policies` cannot be imported; the other policies work."""


@dataclass(frozen=True, slots=True)
class NamedPolicy:
    """A policy that is there: name and parameters as `scheduler.resolve_policy` takes them, and how it was asked for.

    ``files``: sources outside of the package that it comes from, for what must know whether they have changed.
    """

    name: str
    params: Mapping[str, Any]
    text: str
    files: tuple[Path, ...] = field(default=())

    def simulated(self, **settings: Any) -> SimulationConfig:
        """A simulation's configuration with this policy."""
        return SimulationConfig(policy=self.name, params=dict(self.params), label=self.text, **settings)


@dataclass(frozen=True, slots=True)
class FailedEntryPoint:
    """An entry point that could not be imported, and why."""

    name: str
    value: str
    distribution: str
    reason: str

    def __str__(self) -> str:
        return f"entry point {self.name} = {self.value} of {self.distribution} cannot be imported: {self.reason}"


def open_policy(text: str) -> NamedPolicy:
    """The policy that a text names; its file or the entry points are imported where that is needed.

    Raises PolicyError for an unknown name, an unknown parameter or a wrong value; ConfigError for a file that is not
    there, that cannot be imported, or that has no policy.
    """
    name, given = _read(text)
    try:
        resolve_policy(name)
    except PolicyError as error:
        failed = load_entry_points()
        if not _is_known(name):
            raise PolicyError("\n".join([str(error), *map(str, failed)])) from error
    resolve_policy(name, **given)
    return NamedPolicy(name, given, text, _files_of(name))


def in_place_of(text: str, places: Mapping[str, str]) -> str:
    """The text on a machine where policy files lie in other places: path here (resolved) -> path there."""
    found = FILE_SPEC.fullmatch(text)
    if found is None:
        return text
    path = str(Path(found["file"]).expanduser().resolve())
    return places.get(path, found["file"]) + text[found.end("file") :]


def load_file(path: Path) -> tuple[Extension, ...]:
    """Imports a file of policies; a file that has not changed is imported once. Raises ConfigError."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"no policy file at {path} ({error.strerror}): expected a Python file, or a name") from error
    _import(path.resolve(), digest)
    found = tuple(entry for entry in extensions() if Path(entry.file).resolve() == path.resolve())
    if not found:
        raise ConfigError(
            f"{path} has no policy: decorate a class or function with @policy(...) of scheduler.extension, see "
            "CONTRIBUTING.md"
        )
    return found


@cache
def load_entry_points() -> tuple[FailedEntryPoint, ...]:
    """Imports what installed packages offer, once; returns those that failed, each warned about."""
    failed = []
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # noqa: BLE001  # another author's module: the others must work
            failed.append(_failure(point, error))
            warnings.warn(str(failed[-1]), PolicyImportWarning, stacklevel=2)
    return tuple(failed)


def _failure(point: EntryPoint, error: Exception) -> FailedEntryPoint:
    distribution = point.dist.name if point.dist is not None else "an unknown package"
    return FailedEntryPoint(point.name, point.value, distribution, f"{type(error).__name__}: {error}")


@cache
def _import(path: Path, digest: str) -> None:
    """Runs the file as a module of its own. ``digest``: of its contents, so that a changed file is imported again."""
    name = f"hybrimoe_policies_{path.stem}_{digest[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # types and pickles look a module up by its name
    try:
        spec.loader.exec_module(module)
    except SchedulerError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # another author's module: whatever it raises, it must be named
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{path}{where} cannot be imported: {type(error).__name__}: {error}") from error


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """(name, parameters); a file is imported on the way."""
    found = FILE_SPEC.fullmatch(text)
    if found is None:
        name, _, rest = text.partition(":")
        return name.strip(), _parameters(text, rest)
    entries = load_file(Path(found["file"]).expanduser())
    name = found["name"] or (entries[-1].name if len(entries) == 1 else "")
    if not name:
        names = ", ".join(entry.name for entry in entries)
        raise ConfigError(
            f"{found['file']} has several policies ({names}); say which: {found['file']}::{entries[0].name}"
        )
    return name, _parameters(text, found["rest"] or "")


def _parameters(text: str, rest: str) -> dict[str, Any]:
    """`alpha=0.1,scope=pool` as a mapping, values read as YAML."""
    params: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise PolicyError(f"policy {text!r}: expected NAME or NAME:parameter=value,parameter=value, found {part!r}")
        try:
            params[name.strip()] = plain_value(value)
        except YamlRulesError as error:
            raise PolicyError(f"policy {text!r}: {value!r} is no value of a parameter") from error
    return params


def _is_known(name: str) -> bool:
    try:
        resolve_policy(name)
    except PolicyError:
        return False
    return True


def _files_of(name: str) -> tuple[Path, ...]:
    policy = resolve_policy(name)
    parts = {(kind, getattr(policy, kind)) for kind in ("balance", "prefetch", "cache")}
    return tuple(sorted({Path(entry.file) for entry in extensions() if (entry.kind, entry.name) in parts}))
