"""`hybrimoe bench overhead`: what planning, bookkeeping and dispatch add to the kernels of a decode step."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hybrimoe.cli.bench import options
from hybrimoe.cli.shared.options import JsonOption


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
    as_json: JsonOption = False,
) -> None:
    """Microseconds of one layer call beside its kernels, without and with an emulated accelerator.

    The sections of each call are timed in the calling thread while the real kernels run: they push the program out of
    the caches, which makes the same code several times as slow as alone. Results are compared with the reference before
    anything is timed.
    """
    from hybrimoe.bench import overhead as overhead_bench
    from hybrimoe.cli.views import render

    request = overhead_bench.Request(
        shape=shape,
        layers=layers,
        policies=tuple(policy or ("ours", "hybrimoe")),
        dtype=dtype,
        slots=slots,
        steps=min(steps, 15) if quick else steps,
        rounds=min(rounds, options.QUICK_ROUNDS) if quick else rounds,
    )
    result = overhead_bench.measure(request)
    if as_json:
        render.emit_json(result)
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    from hybrimoe.bench.overhead import OVERHEAD, SECTIONS
    from hybrimoe.cli.views import render

    if result["remark"]:
        render.note(result["remark"])
    request, contenders = result["request"], result["contenders"]
    rows = [
        ("whole call", *(f"{row['layer_us']['median']:.0f}" for row in contenders)),
        *((name, *(f"{row['sections_us'][name]['median']:.0f}" for row in contenders)) for name in SECTIONS),
        ("held up", *(f"{row['held_up_us']['median']:.0f}" for row in contenders)),
        ("overhead", *(f"{row['overhead_us']['median']:.0f}" for row in contenders)),
        ("its share", *(f"{row['share']:.1%}" for row in contenders)),
    ]
    columns = ("us", *(row["name"].replace("emulated accelerator, ", "emulated: ") for row in contenders))
    title = f"One MoE layer of {request['shape']}, {request['dtype']}, one token: us of the calling thread, measured"
    render.out().print(render.table(title, columns, rows))
    render.note(
        f"Medians of {request['rounds']} rounds. Overhead = {' + '.join(OVERHEAD)}, CPU time. Held up: not running in"
        " them, because others had the core or Python's lock (the threads of an emulated accelerator do)."
    )
