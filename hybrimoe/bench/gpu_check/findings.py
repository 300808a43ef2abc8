"""What one section found: tables of figures, remarks, problems. Saved after each addition."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hybrimoe.bench.gpu_check.setting import Setting
from hybrimoe.errors import HybriMoEError


class SkippedError(HybriMoEError):
    """A section does not apply here; the message says why."""


def _unsaved(data: dict[str, Any]) -> None:
    """Findings that stay in this process."""


@dataclass(slots=True)
class Findings:
    """Collected by a section. `save` is called with `as_dict` after each addition: what was found outlives a crash."""

    save: Callable[[dict[str, Any]], None] = _unsaved
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    until: float = math.inf
    """s of time.monotonic after which no further part is to begin."""
    left_out: list[str] = field(default_factory=list)

    def row(self, table: str, **columns: Any) -> None:
        """One line of a table: texts, numbers, or None. Units stand in the columns' names."""
        self.tables.setdefault(table, []).append(columns)
        self.save(self.as_dict())

    def remark(self, text: str) -> None:
        """Something to know that is no failure."""
        self.remarks.append(text)
        self.save(self.as_dict())

    def problem(self, text: str) -> None:
        """Something that is not as it must be: the section has failed, and goes on."""
        self.problems.append(text)
        self.save(self.as_dict())

    def require(self, holds: bool, text: str) -> None:
        """A problem unless `holds`."""
        if not holds:
            self.problem(text)

    def time_for(self, what: str) -> bool:
        """Whether a part of a section may begin; one that may not is told."""
        if time.monotonic() < self.until:
            return True
        self.left_out.append(what)
        self.remark(f"no time was left for {what}")
        return False

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A part of a section: what it raises is a problem of the section, and the other parts are tried all the
        same."""
        try:
            yield
        except SkippedError:
            raise
        except Exception as error:  # noqa: BLE001  # one part's failure must not hide the others' results
            self.failed(what, error)

    def failed(self, what: str, error: Exception) -> None:
        """A problem that was raised, with where it came from."""
        self.problem(f"{what}: {type(error).__name__}: {error}")
        self.remark("".join(traceback.format_exception(error)))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"tables": self.tables, "remarks": self.remarks, "problems": self.problems}


def run_section(run: Callable[[Setting, Findings], None], setting: Setting, findings: Findings) -> dict[str, Any]:
    """Runs a section; its findings with `status` (ok, failed, skipped) and `why`. Whatever it raises is its result."""
    try:
        run(setting, findings)
    except SkippedError as reason:
        return findings.as_dict() | {"status": "skipped", "why": str(reason)}
    except Exception as error:  # noqa: BLE001  # one section's failure must not hide the others' results
        findings.failed("the section", error)
    problems = findings.problems
    left_out = [f"no time for {', '.join(findings.left_out)}"] if findings.left_out else []
    return findings.as_dict() | {"status": "failed" if problems else "ok", "why": "; ".join([*problems, *left_out])}
