"""`hybrimoe bench tiers`: experts that do not fit host memory, ours beside a mapped file, static sets and llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrimoe.cli.bench import options
from hybrimoe.cli.shared.options import JsonOption, ThreadsOption

SHARES = (0.25, 0.5, 0.75)
MIB = 2**20
DTYPE = "int4"
"""Of experts whose values both we and llama.cpp have (Q4_0)."""
ALLOWANCE = "96MiB"
"""What a whole model takes beside its weights in a run of the default length: about 45 MiB of OLMoE's shape."""
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
    system_limit: Annotated[
        bool,
        typer.Option(
            "--system-limit",
            help="Whole models under a limit of the system (memory cgroup: needs root), llama.cpp's beside ours.",
        ),
    ] = False,
    allowance: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="With --system-limit: memory beside dense weights and experts; default 96MiB."
        ),
    ] = None,
    threads: ThreadsOption = None,
    rounds: options.RoundsOption = 3,
    quick: options.QuickOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tokens a second of expert layers of which host memory holds a share, in alternating cold rounds.

    The same routing is computed with the same memory: ours; ours, but keeping what was used latest; with a static set
    of experts; and over a memory-mapped file. All of them must give the same bits. Only the layers of experts are
    computed.

    With --system-limit, whole models compute a prompt and a reply: ours; with a static set; over a mapped file; and
    llama.cpp, which maps the same weights as a GGUF file (packages llama-cpp-python and gguf). Each is a process of its
    own in a memory cgroup, whose limit holds the page cache, too.
    """
    allowance_bytes = _allowance_bytes(allowance, dtype, system_limit=system_limit)
    from cpu_kernels.jit.cache_dir import cache_home
    from hybrimoe.bench.tiers import layers as layers_alone
    from hybrimoe.cli.shared.opening import progress_bar, quiet_libraries
    from hybrimoe.cli.views import render

    shares = share or SHARES
    request = layers_alone.Request(
        shape, layers, dtype, shares[0], prompt_tokens, min(new_tokens, QUICK_TOKENS) if quick else new_tokens,
        min(rounds, options.QUICK_ROUNDS) if quick else rounds, trace, folder or cache_home(), threads,
    )  # fmt: skip
    with progress_bar(not as_json) as progress:
        if system_limit:
            from hybrimoe.bench.tiers import whole_model

            quiet_libraries()
            results = whole_model.measure(request, shares, allowance_bytes, progress)
        else:
            results = [layers_alone.measure(replace(request, share=part), progress) for part in shares]
    if as_json:
        render.emit_json(results)
    else:
        _show(results)


def _allowance_bytes(text: str | None, dtype: str, *, system_limit: bool) -> int:
    """Of --system-limit. Raises ConfigError for options that do not go together, or no size."""
    from hybrimoe.amounts import parse_amount
    from hybrimoe.errors import ConfigError

    if system_limit and dtype != DTYPE:
        raise ConfigError(f"--system-limit compares {DTYPE} experts, which llama.cpp has too, found --dtype {dtype}")
    if not system_limit and text is not None:
        raise ConfigError("--allowance goes with --system-limit")
    amount = parse_amount(ALLOWANCE if text is None else text)
    if amount.kind != "bytes" or not amount.value:
        raise ConfigError(f"--allowance: expected a size like {ALLOWANCE}, found {text!r}")
    return int(amount.value)


def _show(results: list[dict[str, Any]]) -> None:
    from hybrimoe.cli.views import render

    first = results[0]
    if first["remark"]:
        render.note(first["remark"])
    whole = "limit_bytes" in first
    request, mib = first["request"], first["n_records"] * first["record_bytes"] / MIB
    what = f"{request['layers']} {'' if whole else 'MoE '}layers of {request['shape']}, {request['dtype']}"
    columns: tuple[str, ...] = ("in memory", "", "prefill", "decode", "reads waited for", "read ahead")
    rows: list[tuple[str, ...]] = [_cells(found, row) for found in results for row in found["contenders"]]
    if whole:
        columns += ("start, s", "most memory, MiB")
        rows = [(*cells, *_whole_cells(row)) for cells, row in zip(rows, _contenders(results), strict=True)]
    render.out().print(render.table(f"{what}, {mib:.0f} MiB of experts: tokens/s", columns, rows))
    for found in results if whole else ():
        dense, allowance, limit = (found[f"{what}_bytes"] / MIB for what in ("dense", "allowance", "limit"))
        experts = found["n_slots"] * found["record_bytes"] / MIB
        render.note(
            f"{found['request']['share']:.0%}: a limit of {limit:.0f} MiB: experts {experts:.0f}, dense weights"
            f" {dense:.0f}, allowance {allowance:.0f}"
        )
    for name in first.get("left_out", ()):
        render.note(f"{name} is left out: it needs the package llama-cpp-python")
    render.note(
        f"Medians and spread of {request['rounds']} cold rounds; the disk reads {first['disk_gbps']:.2f} GB/s."
        f" Measured on {first['machine']['cpu']}, {first['machine']['cores']} cores."
    )


def _contenders(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for found in results for row in found["contenders"]]


def _cells(found: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    """A contender's line: share, name, speeds, reads in decode steps."""
    counters = row["counters"]
    reads = [counters["decode"][name] if counters else 0 for name in ("disk_reads", "disk_ahead")]
    speeds = (_speed(row[phase]) for phase in ("prefill", "decode"))
    return (f"{found['request']['share']:.0%}", row["name"], *speeds, *(str(count or "-") for count in reads))


def _whole_cells(row: dict[str, Any]) -> tuple[str, str]:
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MIB:.0f}"
    return f"{row['start_s']['median']:.1f}", peak


def _speed(found: dict[str, Any]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f}-{found['max']:.2f})"
