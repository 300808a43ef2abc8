"""`hybrimoe doctor`: what works on this machine, what does not, and what to do."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli.shared.options import JsonOption
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from rich.table import Table

    from hybrimoe.machine.check import Check

KernelsOption = Annotated[
    bool,
    typer.Option("--kernels/--no-kernels", help="Also run an expert on the CPU (compiles on first use, about 10 s)."),
]
GpuOption = Annotated[
    bool, typer.Option("--gpu", help="Check an accelerator: results, speed, waits, memory, failures. Minutes.")
]
GPU = "With --gpu"
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--accelerator", metavar="DEVICE", help="cuda:0, xpu:0, or emulated; torch's own if not given.",
        rich_help_panel=GPU,
    ),
]  # fmt: skip
MinutesOption = Annotated[
    float | None, typer.Option(min=0.2, help="Time for all checks; 9 if not given.", rich_help_panel=GPU)
]
QuickOption = Annotated[bool, typer.Option("--quick", help="The same as --minutes 3.", rich_help_panel=GPU)]
ReportOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the report goes; gpu-check-DATE here if not given.", rich_help_panel=GPU),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="SECTION", help="Only this section; may be repeated.", rich_help_panel=GPU),
]
FULL_MINUTES, QUICK_MINUTES = 9.0, 3.0
STYLES = {"ok": "green", "info": "dim", "warn": "yellow", "broken": "bold red"}


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("doctor")(doctor)


def doctor(
    *,
    kernels: KernelsOption = True,
    as_json: JsonOption = False,
    gpu: GpuOption = False,
    accelerator: DeviceOption = None,
    minutes: MinutesOption = None,
    quick: QuickOption = False,
    report: ReportOption = None,
    only: OnlyOption = None,
) -> None:
    """Check versions, CPU, instruction set, threads, accelerators, caches, memory, demo model and extras.

    Exit code 0 if HybriMoE can run here (warnings included), 1 if something essential is broken. With --gpu an
    accelerator is checked instead, and a report written (docs/gpu-check.md); exit code 1 if a check failed.
    """
    if gpu:
        check_gpu(accelerator, minutes or (QUICK_MINUTES if quick else FULL_MINUTES), report, only, as_json=as_json)
        return
    refuse_without_gpu(accelerator=accelerator, minutes=minutes, quick=quick or None, report=report, only=only)
    from hybrimoe.cli.shared.opening import quiet_libraries
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


def refuse_without_gpu(**options: Any) -> None:
    """Raises ConfigError for options that mean something with --gpu only."""
    from hybrimoe.errors import ConfigError

    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"{', '.join(given)} go with --gpu: hybrimoe doctor --gpu {given[0]} ...")


def check_gpu(
    accelerator: str | None, minutes: float, folder: Path | None, only: list[str] | None, *, as_json: bool
) -> None:
    """Runs the acceptance kit; a line a section while it runs, then where the report is. Exit code 1 if one failed."""
    from hybrimoe.bench.gpu_check import report
    from hybrimoe.bench.gpu_check.card import device_name
    from hybrimoe.bench.gpu_check.check import check
    from hybrimoe.bench.gpu_check.sections import chosen
    from hybrimoe.cli.shared.opening import quiet_libraries

    quiet_libraries()
    sections = chosen(only)
    device = device_name(accelerator)
    folder = folder or Path(f"gpu-check-{datetime.now():%Y-%m-%d-%H%M%S}")
    render.note(f"checking {device} for at most {minutes:g} minutes; the report grows in {folder}")
    result = check(device, minutes, folder, _show_section, sections=sections)
    if as_json:
        render.emit_json(result)
    else:
        render.out().print(f"{report.verdict(result)}; {folder / report.NAMES['html']}", soft_wrap=True)
    if not result["ok"]:
        raise typer.Exit(1)


def _show_section(section: dict[str, Any]) -> None:
    """On stderr: stdout is for the result."""
    style = {"ok": "green", "skipped": "dim", "failed": "bold red"}[section["status"]]
    why = " ".join(section["why"].split())
    render.err().print(
        f"[{style}]{section['status']:8}[/]{section['seconds']:6.1f} s  {section['title']}", highlight=False
    )
    if why:
        render.note(f"                   {why}")


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
