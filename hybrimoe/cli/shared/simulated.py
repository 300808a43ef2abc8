"""The options of commands that simulate a trace: which trace, on which machine, in the shape of which model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_HARDWARE = "rtx4090-ryzen9"

AcceleratorsOption = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="So many accelerators, each with its layers, slots and link. Default: profile."),
]
PolicyOption = Annotated[
    str, typer.Option(metavar="NAME", help="A preset, balance/prefetch/cache, or FILE.py; :name=value sets parameters.")
]
CacheRatioOption = Annotated[
    float, typer.Option(metavar="R", min=0.0, max=1.0, help="Share of all experts that has a slot.")
]
HostRatioOption = Annotated[
    float, typer.Option(metavar="R", help="Share of all experts that host memory holds; the rest is on disk.")
]
ExpertDtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, int8, int6, int5, int4, int3, or int2.")]
DenseDtypeOption = Annotated[str, typer.Option(help="Weights outside the experts.")]


@dataclass(frozen=True, slots=True)
class SettingGroup:
    """What is simulated, under which seed."""

    trace: Annotated[
        str | None, typer.Option("--trace", metavar="T", help="An .npz trace, demo, or synthetic. Default: demo.")
    ] = None
    hardware: Annotated[str, typer.Option("--hardware", metavar="P", help="Hardware profile: a name or a file.")] = (
        DEFAULT_HARDWARE
    )
    model_shape: Annotated[
        str | None, typer.Option("--model-shape", metavar="M", help="Model shape: a name, config.json, or directory.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same numbers.")] = 0

    def check(self) -> None:
        """Raises YamlRulesError, ProfileError or TraceError where trace, hardware or shape are not there.

        Commands ask this before they import the simulator.
        """
        from hybrimoe.machine.profiles import open_hardware, open_shape

        open_hardware(self.hardware)
        if self.model_shape is not None:
            open_shape(self.model_shape)
        check_trace(self.trace)


def check_trace(source: str | None) -> None:
    """Raises TraceError where `source` is neither a trace's name nor a file that can be opened."""
    from scheduler.traces.trace import TraceError

    if source in (None, "demo", "synthetic"):
        return
    try:
        with Path(source).expanduser().open("rb"):
            pass
    except OSError as error:
        raise TraceError(
            f"no trace at {source} ({error.strerror}): expected an .npz file, demo, or synthetic"
        ) from error
