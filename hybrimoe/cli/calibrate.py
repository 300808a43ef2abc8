"""`hybrimoe calibrate`: measures this machine into a hardware profile that the scheduler reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.common import JsonOption, check_folder, check_writable
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.machine.calibration import Calibration

DTYPES = ("int4", "int8", "bfloat16", "float32")
DEFAULT_SHAPE = "olmoe-1b-7b"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("calibrate")(calibrate)


def calibrate(
    shape: Annotated[
        list[str] | None, typer.Option(help="Model shape (a name, config.json or model directory); may be repeated.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Expert dtype; may be repeated. Default: all four.")] = None,
    accelerator: Annotated[str, typer.Option(metavar="DEVICE", help="cuda:0, xpu:0, emulated, none, auto.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Profile to write; default: this machine's own.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time for the tables.")] = 75.0,
    as_json: JsonOption = False,
) -> None:
    """Measure CPU, link and accelerator, alone and while the others run, into a profile (under 90 s)."""
    from hybrimoe.config.values import parse_accelerators
    from hybrimoe.errors import ConfigError
    from hybrimoe.machine.profiles import open_shape, profile_path

    wrong = [name for name in dtype or () if name not in DTYPES]
    if wrong:
        raise ConfigError(f"--dtype {wrong[0]}: expected one of {', '.join(DTYPES)}")
    sizes = dict.fromkeys((found.hidden, found.inter) for found in map(open_shape, shape or [DEFAULT_SHAPE]))
    parse_accelerators(accelerator)
    path = output or profile_path()
    check_folder(path.parent)
    check_writable(path)
    from hybrimoe.machine import calibrate as measuring
    from hybrimoe.machine import calibration

    request = measuring.Request(
        shapes=tuple(sizes),
        dtypes=tuple(dtype or DTYPES),  # type: ignore[arg-type]
        accelerator=accelerator,
        budget_s=seconds,
    )
    result = measuring.calibrate(request, render.note)
    calibration.write_profile(result, path)
    if as_json:
        render.emit_json({**calibration.summary(result), "file": str(path)})
    else:
        _show(result, path)


def _show(result: Calibration, path: Path) -> None:
    rows = [[name, f"{mid:.4g}", f"{low:.4g}", f"{high:.4g}"] for name, (low, mid, high) in result.spread.items()]
    render.out().print(render.table(f"measured: {result.profile.source}", ["figure", "median", "min", "max"], rows))
    for name, times in result.backends.items():
        order = sorted(times, key=lambda backend: (times[backend], backend))
        render.note(f"{name}: " + ", ".join(f"{backend} {times[backend]:.0f} us" for backend in order))
    render.note(f"{result.seconds:.0f} s, written to {path}")
