"""`hybrimoe bench ablation`: the paper's experiments, then every policy on every trace and profile (all simulated)."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrimoe.cli.shared.files import check_folder
from hybrimoe.cli.shared.options import JsonOption
from hybrimoe.cli.shared.simulated import check_trace
from hybrimoe.cli.views import render

EXPERIMENTS = ("table3", "sensitivity", "paper", "hits", "policies", "lossy")
#: Decode tokens of each row; quick is for a look, full for figures to report.
QUICK_TOKENS, FULL_TOKENS = 24, 128
QUICK_PREFILLS = (32, 128)
QUICK_RATIOS, FULL_RATIOS = (0.25,), (0.25, 0.5, 0.75)


def register(app: typer.Typer) -> None:
    """Add `bench ablation`."""
    app.command("ablation")(ablation)


def _a_number_of_jobs(jobs: int) -> int:
    """Raises typer.BadParameter for what joblib would refuse, or read as "all cores but some"."""
    if jobs != -1 and jobs < 1:
        raise typer.BadParameter(f"expected 1 or more processes, or -1 for one a core; found {jobs}")
    return jobs


def ablation(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Rows, tables, plots and report go here.")
    ] = Path("ablation"),
    experiment: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(EXPERIMENTS)}; repeatable. Default: all.")
    ] = None,
    trace: Annotated[list[str] | None, typer.Option(help="Further .npz traces beside demo; repeatable.")] = None,
    model_shape: Annotated[
        str | None, typer.Option(metavar="M", help="Shape of the traces' models, where their names do not say it.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="P", help="Further policies beside the presets, as in `simulate`; repeatable."),
    ] = None,
    hardware: Annotated[
        list[str] | None,
        typer.Option(metavar="H", help="Machines of `policies`, names or files; repeatable. Default: shipped."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short traces, fewer settings.")] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", callback=_a_number_of_jobs, help="Processes; -1: one a core.")
    ] = 1,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Use the Ray cluster at RAY_ADDRESS, or the one that runs here."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same rows.")] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Seeds, from --seed on: each draws other synthetic traces and begins recorded ones "
            "with another sequence; figures are means with standard deviations.",
        ),
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Simulate the ablation. Rows are kept in DIR/rows: an interrupted sweep goes on where it stopped."""
    chosen = _experiments(experiment)
    for name in trace or ():
        check_trace(name)
    if cluster and jobs != 1:
        raise typer.BadParameter("--jobs is for this machine; a cluster uses all of its CPUs")
    check_folder(out / "rows")
    from hybrimoe.bench.ablation.summary import summarise, tables
    from hybrimoe.bench.ablation.sweep import sweep

    compared = Compared(tuple(trace or ()), model_shape or "", tuple(policy or ()), tuple(hardware or ()))
    cases = build_cases(chosen, compared, quick=quick, seeds=range(seed, seed + seeds))
    rows = sweep(cases, out / "rows", jobs=jobs, cluster=cluster, progress=_tell)
    summary = summarise(rows)
    written = write(out, rows, summary)
    if as_json:
        render.emit_json({**summary, "rows": len(rows), "files": written})
        return
    for title, columns, cells in tables(summary):
        render.out().print(render.table(f"{title} (simulated)", columns, cells))
        render.out().print()
    render.note("written: " + ", ".join(str(path) for path in written))


def _experiments(names: list[str] | None) -> tuple[str, ...]:
    from hybrimoe.errors import ConfigError, unknown

    for name in names or ():
        if name not in EXPERIMENTS:
            raise ConfigError(unknown("experiment", name, EXPERIMENTS))
    return tuple(names) if names else EXPERIMENTS


@dataclass(frozen=True, slots=True)
class Compared:
    """What the experiment `policies` compares beside the presets. ``hardware``: empty for the shipped machines."""

    traces: tuple[str, ...] = ()
    shape: str = ""
    policies: tuple[str, ...] = ()
    hardware: tuple[str, ...] = ()


def build_cases(
    experiments: tuple[str, ...], compared: Compared = Compared(), *, quick: bool, seeds: Sequence[int] = (0,)
) -> list[Any]:
    """Every case of the chosen experiments, each with every seed. Names are checked, so that no late row fails."""
    from hybrimoe.bench.ablation import cases as paper
    from hybrimoe.bench.ablation.sweep import SYNTHETIC, check_sources
    from hybrimoe.tracing.sources import DEMO

    for note in check_sources(compared.traces, compared.shape, compared.policies, compared.hardware):
        render.note(note)
    tokens = QUICK_TOKENS if quick else FULL_TOKENS
    made = {
        "table3": lambda: paper.table_3(tokens),
        "sensitivity": lambda: paper.sensitivity(tokens),
        "paper": lambda: paper.speedups(tokens, QUICK_PREFILLS if quick else paper.PAPER_PREFILLS),
        "hits": lambda: paper.hit_rates(tokens),
        "policies": lambda: paper.every_policy(
            [(DEMO, ""), *((name, compared.shape) for name in compared.traces), (SYNTHETIC, "olmoe-1b-7b")],
            tokens,
            QUICK_RATIOS if quick else FULL_RATIOS,
            compared.policies,
            compared.hardware or paper.EVERY_HARDWARE,
        ),
        "lossy": lambda: paper.lossy(tokens),
    }
    return [replace(case, seed=seed) for seed in seeds for name in experiments for case in made[name]()]


def _tell(done: int, total: int) -> None:
    if done == total or done % 20 == 0:
        render.note(f"{done} of {total} rows")


def write(out: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[Path]:
    """rows.csv, rows.parquet (pyarrow), summary.json, tables.md, tables.tex, plots (matplotlib) and report.html.

    Returns the paths.
    """
    from hybrimoe.bench.ablation.summary import latex, markdown, tables

    written = [out / "rows.csv", out / "summary.json", out / "tables.md", out / "tables.tex"]
    with written[0].open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    written[1].write_text(json.dumps(summary, indent=2), encoding="utf-8")
    found = tables(summary)
    pages = "\n".join(f"## {title} (simulated)\n\n{markdown(columns, cells)}\n" for title, columns, cells in found)
    written[2].write_text(pages, encoding="utf-8")
    written[3].write_text("\n".join(latex(*table) for table in found), encoding="utf-8")
    return [*written, *_write_parquet(out / "rows.parquet", rows), *_write_report(out, rows, summary)]


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> list[Path]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        render.note("no rows.parquet: pyarrow is not installed (extra bench)")
        return []
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return [path]


def _write_report(out: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[Path]:
    from hybrimoe.bench.ablation.summary import tables
    from hybrimoe.errors import MissingExtraError
    from hybrimoe.tracing.study import plots

    sections = [(title, plots.html_table(columns, cells)) for title, columns, cells in tables(summary)]
    written = []
    try:
        for name, data in figures(rows, summary).items():
            (out / name).write_bytes(data)
            written.append(out / name)
            sections.append((name.removesuffix(".png"), plots.image(data, name)))
    except MissingExtraError:
        render.note("no plots: matplotlib is not installed (extra bench)")
    page = plots.page("Ablation (simulated)", [("", plots.paragraph("All figures are simulated.")), *sections])
    (out / "report.html").write_text(page, encoding="utf-8")
    return [*written, out / "report.html"]


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, bytes]:
    """Bar charts of Table III and of every policy; of each trace, a panel a machine, latency over the cached share and
    what the lanes are busy with."""
    from hybrimoe.bench.ablation.summary import busy_lanes, latency_by_share
    from hybrimoe.tracing.study import plots

    found = {}
    if "table3" in summary:
        decode = [row for row in summary["table3"] if row["phase"] == "decode"]
        series = {"simulated": [r["simulated_s"] for r in decode], "paper": [r["paper_s"] or 0.0 for r in decode]}
        errors = {"simulated": [r["sd"]["simulated_s"] for r in decode]} if "sd" in decode[0] else {}
        found["table3.png"] = plots.bars("Table III, decode", "s a token", [r["step"] for r in decode], series, errors)
    if "policies" in summary:
        means = summary["policies"]
        series = {"speed-up": [row["speedup"] for row in means]}
        errors = {"speed-up": [row["sd"]["speedup"] for row in means]} if "sd" in means[0] else {}
        found["policies.png"] = plots.bars(
            "Every policy, decode: speed-up over static (simulated)", "x", [row["policy"] for row in means], series,
            errors,
        )  # fmt: skip
    compared = [row for row in rows if row["experiment"] == "policies"]
    for trace in dict.fromkeys(row["trace"] for row in compared):
        mine, name = [row for row in compared if row["trace"] == trace], Path(trace).stem
        shares = {row["cache_ratio"] for row in mine}
        if len(shares) > 1:
            found[f"share-{name}.png"] = plots.line_panels(
                f"{name}: decode (simulated)", "share of the experts cached", "ms a token", latency_by_share(mine)
            )
        share = min(shares)
        found[f"lanes-{name}.png"] = plots.stacked_panels(
            f"{name}: busy lanes, {share:.0%} cached (simulated)", "ms a token", busy_lanes(mine, share)
        )
    return found
