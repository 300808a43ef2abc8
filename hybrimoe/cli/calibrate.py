"""`hybrimoe calibrate`: measures this machine into a hardware profile that the scheduler reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.shared.files import check_folder, check_writable
from hybrimoe.cli.shared.options import JsonOption
from hybrimoe.cli.views import render
from scheduler.machine.profile import BYTES_PER_WEIGHT

if TYPE_CHECKING:
    from hybrimoe.machine.calibrate import Request
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
    dtype: Annotated[
        list[str] | None, typer.Option(help="Expert dtype; may be repeated. Default: int4, int8, bfloat16, float32.")
    ] = None,
    accelerator: Annotated[str, typer.Option(metavar="DEVICE", help="cuda:0, xpu:0, emulated, none, auto.")] = "auto",
    disk: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Folder whose disk is measured, or a large file on it; default: the cache. none: not."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Profile to write; default: this machine's own.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time for the tables.")] = 75.0,
    as_json: JsonOption = False,
) -> None:
    """Measure CPU, link and accelerator, alone and while the others run, and the disk, into a profile (under 90 s).

    The disk is read past the page cache, in blocks of the size of an expert, with several numbers of reads at once. A
    folder gets a file for it, of 512 MiB at most, which is removed again.
    """
    from hybrimoe.config.values import parse_accelerators
    from hybrimoe.errors import ConfigError
    from hybrimoe.machine.profiles import open_shape, profile_path

    wrong = [name for name in dtype or () if name not in BYTES_PER_WEIGHT]
    if wrong:
        raise ConfigError(f"--dtype {wrong[0]}: expected one of {', '.join(BYTES_PER_WEIGHT)}")
    sizes = dict.fromkeys((found.hidden, found.inter) for found in map(open_shape, shape or [DEFAULT_SHAPE]))
    parse_accelerators(accelerator)
    path = output or profile_path()
    check_folder(path.parent)
    check_writable(path)
    if disk not in (None, "none") and not Path(disk).exists():
        raise ConfigError(f"--disk {disk}: expected a folder or a file that is there, or none")
    from cpu_kernels.jit.cache_dir import cache_home
    from hybrimoe.machine import calibrate as measuring
    from hybrimoe.machine import calibration

    request = measuring.Request(
        shapes=tuple(sizes),
        dtypes=tuple(dtype or DTYPES),  # type: ignore[arg-type]
        accelerator=accelerator,
        budget_s=seconds,
    )
    result = measuring.calibrate(request, render.note)
    if disk != "none":
        result = _with_disk(result, cache_home() if disk is None else Path(disk), request)
    calibration.write_profile(result, path)
    if as_json:
        render.emit_json({**calibration.summary(result), "file": str(path)})
    else:
        _show(result, path)


def _with_disk(result: Calibration, place: Path, request: Request) -> Calibration:
    """With the disk under `place`, read in experts of the first shape and dtype; as it was where that cannot be."""
    from cpu_kernels import ExpertSpec
    from hybrimoe.errors import CheckpointError, FileError
    from hybrimoe.machine.disks import disk_text
    from hybrimoe.runtime.tier.disk_speed import measure_disk

    (hidden, inter), dtype = request.shapes[0], request.dtypes[0]
    render.note(f"the disk of {place}")
    try:
        found = measure_disk(place, ExpertSpec(hidden, inter, dtype).record_bytes)
    except (FileError, CheckpointError) as error:
        render.note(f"the disk is not in the profile: {error}")
        return result
    disk = found.profile()
    render.note(f"{disk_text(disk)}{'' if found.direct else '; through the page cache, there are no direct reads'}")
    rounds = {f"disk.gbps, {depth} in flight": values for depth, values in found.gbps.items()}
    rounds["disk, one read alone, us"] = found.alone_us
    spread = result.spread | {name: (min(v), median(v), max(v)) for name, v in rounds.items()}
    return replace(result, profile=replace(result.profile, disk=disk), spread=spread)


def _show(result: Calibration, path: Path) -> None:
    rows = [[name, f"{mid:.4g}", f"{low:.4g}", f"{high:.4g}"] for name, (low, mid, high) in result.spread.items()]
    render.out().print(render.table(f"measured: {result.profile.source}", ["figure", "median", "min", "max"], rows))
    for name, times in result.backends.items():
        order = sorted(times, key=lambda backend: (times[backend], backend))
        render.note(f"{name}: " + ", ".join(f"{backend} {times[backend]:.0f} us" for backend in order))
    render.note(f"{result.seconds:.0f} s, written to {path}")
