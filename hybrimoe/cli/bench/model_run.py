"""What `bench decode` and `bench prefill` share: measure, then show a table or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybrimoe.cli.views import render, render_summary
from hybrimoe.cli.views.render_profile import profile_table

if TYPE_CHECKING:
    from hybrimoe.bench.model.measure import Request


def measure_and_show(request: Request, *, as_json: bool) -> None:
    """Measures the contenders of a request; prints one table, or one JSON document."""
    from hybrimoe.bench import rounds
    from hybrimoe.bench.model.measure import measure
    from hybrimoe.cli.common_model import progress_bar, quiet_libraries

    quiet_libraries()
    warning = rounds.busy_warning()
    if warning:
        render.note(warning)
    with progress_bar() as progress:
        result = measure(request, progress)
    if as_json:
        render.emit_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Prints what `bench.model.measure` returned: a line a contender, then the machine."""
    rows = result["results"]
    first = rows[0]["tokens_per_s"]["median"]
    cells = []
    for row in rows:
        speed = row["tokens_per_s"]
        cells.append((
            row["name"],
            f"{speed['median']:.1f}",
            f"{speed['min']:.1f}-{speed['max']:.1f}",
            f"{speed['median'] / first:.2f}x",
            render_summary.percent(row["hit_rate"]),
            render_summary.percent(row["prefetch_precision"]),
            "-" if row["logits_cosine"] is None else f"{row['logits_cosine']:.4f}",
            f"{row['resident_mib']:.0f}",
        ))  # fmt: skip
    columns = ("", "tokens/s", "spread", "", "hits", "prefetch", "cosine", "MiB")
    what = f"{result['bench']}, {result['model']} ({result['weights']} weights), prompt {result['prompt_tokens']}"
    render.out().print(render.table(f"{what}, {result['rounds']} alternating rounds", columns, cells))
    for row in rows:
        if "profile" in row:
            render.out().print(profile_table(row["profile"], f"{row['name']} ({row['provenance']})"))
    described = result["machine"]
    render.out().print(
        f"measured on {described['cpu']}, {described['cores']} cores, torch {described['torch']}"
        + ("; the accelerator is emulated" if any("emulated" in row["provenance"] for row in rows) else ""),
        style="dim",
    )
