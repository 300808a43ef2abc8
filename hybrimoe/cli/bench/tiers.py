"""`hybrimoe bench tiers`: experts that do not fit host memory, ours beside a mapped file and a static set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrimoe.cli import common
from hybrimoe.cli.bench import options

SHARES = (0.25, 0.5, 0.75)
QUICK_TOKENS = 8
"""Tokens of a reply with --quick, at most."""


def register(app: typer.Typer) -> None:
    """Add `tiers`."""
    app.command("tiers")(tiers)


def tiers(
    shape: Annotated[str, typer.Option(metavar="NAME", help="A shipped model shape.")] = "olmoe-1b-7b",
    layers: Annotated[int, typer.Option(min=1, help="MoE layers that are built.")] = 4,
    dtype: Annotated[str, typer.Option(help="Expert dtype.")] = "int4",
    share: Annotated[
        list[float] | None,
        typer.Option(min=0.01, max=0.99, help="Share of the experts in host memory; may be repeated."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Decode steps a round.")] = 32,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Recorded routing; made routing without.")] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the experts' file is put: on the disk to measure.")
    ] = None,
    threads: common.ThreadsOption = None,
    rounds: options.RoundsOption = 3,
    quick: options.QuickOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Tokens a second of expert layers of which host memory holds a share, in alternating cold rounds.

    The same routing is computed with the same memory: ours; ours, but keeping what was used latest; with a static set
    of experts; and over a memory-mapped file. All of them must give the same bits. Only the layers of experts are
    computed.
    """
    from cpu_kernels.jit.cache_dir import cache_home
    from hybrimoe.bench import tiers as tiers_bench
    from hybrimoe.cli.common_model import progress_bar
    from hybrimoe.cli.views import render

    results = []
    for part in share or SHARES:
        request = tiers_bench.Request(
            shape, layers, dtype, part, prompt_tokens, min(new_tokens, QUICK_TOKENS) if quick else new_tokens,
            min(rounds, options.QUICK_ROUNDS) if quick else rounds, trace, folder or cache_home(), threads,
        )  # fmt: skip
        with progress_bar(not as_json) as progress:
            results.append(tiers_bench.measure(request, progress))
    if as_json:
        render.emit_json(results)
    else:
        _show(results)


def _show(results: list[dict[str, Any]]) -> None:
    from hybrimoe.cli.views import render

    first = results[0]
    if first["remark"]:
        render.note(first["remark"])
    rows = [
        (
            f"{found['request']['share']:.0%}", row["name"], *(_speed(row[phase]) for phase in ("prefill", "decode")),
            str(row["counters"]["decode"]["disk_reads"] or "-"), str(row["counters"]["decode"]["disk_ahead"] or "-"),
        )
        for found in results
        for row in found["contenders"]
    ]  # fmt: skip
    request, mib = first["request"], first["n_records"] * first["record_bytes"] / 2**20
    what = f"{request['layers']} MoE layers of {request['shape']}, {request['dtype']}, {mib:.0f} MiB of experts"
    columns = ("in memory", "", "prefill", "decode", "reads waited for", "read ahead")
    render.out().print(render.table(f"{what}: tokens/s", columns, rows))
    render.note(
        f"Medians and spread of {request['rounds']} cold rounds; the disk reads {first['disk_gbps']:.2f} GB/s."
        f" Measured on {first['machine']['cpu']}, {first['machine']['cores']} cores."
    )


def _speed(found: dict[str, Any]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f}-{found['max']:.2f})"
