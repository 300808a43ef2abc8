"""What `bench decode` and `bench prefill` share: measure, then show a table or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybrimoe.cli.views import render, render_summary
from hybrimoe.cli.views.render_profile import profile_table

if TYPE_CHECKING:
    from pathlib import Path

    from hybrimoe.bench.model.measure import Request


def measure_and_show(request: Request, *, csv: Path | None, plot: Path | None, as_json: bool) -> None:
    """Measures the contenders of a request; prints one table, or one JSON document, and writes the files asked for."""
    from hybrimoe.bench import rounds
    from hybrimoe.bench.model.measure import measure, write_csv, write_plot
    from hybrimoe.cli.common_model import progress_bar, quiet_libraries

    quiet_libraries()
    warning = rounds.busy_warning()
    if warning:
        render.note(warning)
    with progress_bar() as progress:
        result = measure(request, progress)
    if csv is not None:
        write_csv(result, csv)
    if plot is not None:
        write_plot(result, plot)
    if as_json:
        render.emit_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Prints what `bench.model.measure` returned: a line a contender, then the machine. Columns that no contender has
    are left out."""
    rows = result["results"]
    first = rows[0]["tokens_per_s"]["median"]
    speeds = [row["tokens_per_s"] for row in rows]
    columns: dict[str, list[str]] = {
        "": [row["name"] for row in rows],
        "tokens/s": [f"{speed['median']:.1f}" for speed in speeds],
        "spread": [f"{speed['min']:.1f}-{speed['max']:.1f}" for speed in speeds],
        " ": [f"{speed['median'] / first:.2f}x" for speed in speeds],
        "of read rate": [render_summary.percent(row["of_read_rate"]) for row in rows],
        "hits": [render_summary.percent(row["hit_rate"]) for row in rows],
        "prefetch": [render_summary.percent(row["prefetch_precision"]) for row in rows],
        "cosine": ["-" if row["logits_cosine"] is None else f"{row['logits_cosine']:.4f}" for row in rows],
        "MiB": [f"{row['resident_mib']:.0f}" for row in rows],
    }
    shown = {title: cells for title, cells in columns.items() if any(cell != "-" for cell in cells)}
    lines = list(zip(*shown.values(), strict=True))
    what = f"{result['bench']}, {result['model']} ({result['weights']} weights), prompt {result['prompt_tokens']}"
    render.out().print(render.table(f"{what}, {result['rounds']} alternating rounds", tuple(shown), lines))
    for row in rows:
        if "profile" in row:
            render.out().print(profile_table(row["profile"], f"{row['name']} ({row['provenance']})"))
    described = result["machine"]
    render.out().print(
        f"measured on {described['cpu']}, {described['cores']} cores, {result['threads']} threads each, torch"
        f" {described['torch']}"
        + ("; the accelerator is emulated" if any("emulated" in row["provenance"] for row in rows) else ""),
        style="dim",
    )
