"""`hybrimoe bench overhead`: what planning, bookkeeping and dispatch add to the kernels of a decode step."""

from __future__ import annotations

from typing import Annotated

import typer

from hybrimoe.cli import common
from hybrimoe.cli.bench import options


def register(app: typer.Typer) -> None:
    """Add `overhead`."""
    app.command("overhead")(overhead)


def overhead(
    shape: Annotated[str, typer.Option(metavar="NAME", help="A shipped model shape.")] = "olmoe-1b-7b",
    layers: Annotated[int, typer.Option(min=2, help="MoE layers that are built.")] = 4,
    policy: options.PolicyList = None,
    dtype: Annotated[str, typer.Option(help="Expert dtype.")] = "int4",
    slots: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the experts with a slot.")] = 0.25,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps a round.")] = 50,
    rounds: options.RoundsOption = 7,
    quick: options.QuickOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Microseconds of one layer call beside its kernels, without and with an emulated accelerator.

    The sections of each call are timed in the calling thread while the real kernels run: they push the program out of
    the caches, which makes the same code several times as slow as alone. Results are compared with the reference before
    anything is timed.
    """
    from hybrimoe.bench import overhead as overhead_bench

    request = overhead_bench.Request(
        shape=shape,
        layers=layers,
        policies=tuple(policy or ("ours", "hybrimoe")),
        dtype=dtype,
        slots=slots,
        steps=min(steps, 15) if quick else steps,
        rounds=min(rounds, options.QUICK_ROUNDS) if quick else rounds,
    )
    overhead_bench.run(request, as_json=as_json)
