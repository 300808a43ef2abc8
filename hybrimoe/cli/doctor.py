"""`hybrimoe doctor`: what works on this machine, what does not, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.common import JsonOption
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from rich.table import Table

    from hybrimoe.machine.check import Check

KernelsOption = Annotated[
    bool,
    typer.Option("--kernels/--no-kernels", help="Also run an expert on the CPU (compiles on first use, about 10 s)."),
]
STYLES = {"ok": "green", "info": "dim", "warn": "yellow", "broken": "bold red"}


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("doctor")(doctor)


def doctor(kernels: KernelsOption = True, as_json: JsonOption = False) -> None:
    """Check versions, CPU, instruction set, threads, accelerators, caches, memory, demo model and extras.

    Exit code 0 if HybriMoE can run here (warnings included), 1 if something essential is broken.
    """
    from hybrimoe.cli.common_model import quiet_libraries
    from hybrimoe.machine.doctor import examine, works

    quiet_libraries()
    checks = examine(kernels)
    ok = works(checks)
    if as_json:
        render.emit_json({"ok": ok, "checks": checks})
    else:
        render.out().print(_table(checks))
        render.out().print(_verdict(checks))
    if not ok:
        raise typer.Exit(1)


def _table(checks: list[Check]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        state = f"[{STYLES[check.status]}]{check.status}[/]"
        table.add_row(state, check.name, escape(check.found), escape(check.advice))
    return table


def _verdict(checks: list[Check]) -> str:
    broken = [check.name for check in checks if check.status == "broken"]
    if broken:
        return f"[bold red]HybriMoE cannot run here[/]: {', '.join(broken)}"
    warned = sum(check.status == "warn" for check in checks)
    return "HybriMoE runs here" + (f", with {warned} warning{'s' if warned > 1 else ''}" if warned else "")
