"""`hybrimoe bench attention`: a decode step's attention over a long context, ours against PyTorch's."""

from __future__ import annotations

from typing import Annotated

import typer

from hybrimoe.cli.shared.options import JsonOption, ThreadsOption
from hybrimoe.cli.views import render


def register(app: typer.Typer) -> None:
    """Add `attention`."""
    app.command("attention")(attention)


def attention(
    context: Annotated[
        list[int] | None, typer.Option("--context", min=1, help="Cached tokens; may be repeated.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Heads of keys and values.")] = 4,
    head_size: Annotated[int, typer.Option(min=16, help="Columns of a head.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 15,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """One layer's attention of one new token, bfloat16 on the CPU: medians of alternating rounds, beside PyTorch.

    Both results are compared with float64 before anything is timed. The defaults are the heads of Qwen3-30B-A3B.
    """
    from hybrimoe.bench.attention import Case, measure

    cases = [Case(tokens, heads, kv_heads, head_size) for tokens in context or [128, 1024, 4096, 16384]]
    rows = [measure(case, rounds, threads) for case in cases]
    if as_json:
        from hybrimoe.machine.facts import machine

        render.emit_json({"rows": rows, "machine": machine()})
        return
    shown = [
        (row["context"], f"{row['ours_us']['median']:.0f}", f"{row['torch_us']['median']:.0f}",
         f"{row['torch_us']['median'] / row['ours_us']['median']:.1f}x", f"{row['gb_per_s']:.1f}")
        for row in rows
    ]  # fmt: skip
    title = f"Attention of one token, {heads} heads on {kv_heads} of {head_size}, bfloat16; us, measured"
    render.out().print(render.table(title, ("context", "ours", "torch", "torch / ours", "GB/s read"), shown))
