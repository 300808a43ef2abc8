"""The result of `hybrimoe trace analyze` as tables, plots, and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrimoe.tracing.study import plots

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def tables(report: dict[str, Any]) -> list[Table]:
    """(title, columns, rows) of every table; cells are text."""
    return [_facts(report), _curves(report, "layer_curves", "Hit rates, slots split evenly over the layers"),
            _curves(report, "pool_curves", "Hit rates of the planner's cache policies"), _consistency(report),
            _predictors(report)]  # fmt: skip


def _facts(report: dict[str, Any]) -> Table:
    entropy = report["load_entropy"]
    rows = [
        ("model", str(report["model"])),
        ("tokens", f"{report['tokens']} ({report['prefill_tokens']} prefill), {report['sequences']} sequences"),
        ("experts", f"{report['layers']} layers of {report['experts']}, top-{report['top_k']}"),
        ("experts kept from token to token", f"{report['overlap']:.1%}"),
        ("median reuse distance", f"{report['reuse']['median']:.0f} tokens"),
        ("load entropy", f"{sum(entropy) / len(entropy):.3f} (lowest layer {min(entropy):.3f}; 1 = even)"),
    ]
    return "Trace", ("", ""), rows


def _curves(report: dict[str, Any], key: str, title: str) -> Table:
    curves = report[key]
    columns = ("policy", *(f"{share:.0%}" for share in curves["shares"]))
    rows = [(name, *(f"{value:.1%}" for value in values)) for name, values in curves.items() if name != "shares"]
    return title, columns, rows


def _consistency(report: dict[str, Any]) -> Table:
    rows = [
        (f"SRP, windows of {row['window']}", f"{row['srp']:.3f}", f"cache share {row['cache_share']:.2f}")
        for row in report["srp"]
    ]
    rows += [(f"SCH, oracle cache of {row['factor']} x top-k", f"{row['hit_rate']:.3f}", "") for row in report["sch"]]
    return "Local routing consistency", ("", "value", ""), rows


def _predictors(report: dict[str, Any]) -> Table:
    rows = [
        (f"{name}, {row['ahead']} ahead", f"{row['recall']:.1%}", f"{row['precision']:.1%}")
        for name, found in report["predictors"].items()
        for row in found
    ]
    return "Routing known ahead", ("predictor", "recall", "precision"), rows


def figures(report: dict[str, Any]) -> dict[str, bytes]:
    """PNG plots by file name. Raises MissingExtraError without matplotlib."""
    curves = dict(report["layer_curves"])
    shares = curves.pop("shares")
    reuse = report["reuse"]
    layers = [str(layer) for layer in range(report["layers"])]
    return {
        "hit_rates.png": plots.lines("Cache hit rate", "share of experts in slots", "hit rate", shares, curves),
        "reuse_distance.png": plots.bars("Reuse distance", "uses", reuse["bins"], {"uses": reuse["counts"]}),
        "load_entropy.png": plots.bars(
            "Load entropy by layer", "entropy / log(experts)", layers, {"entropy": report["load_entropy"]}
        ),
    }


def write_figures(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write every plot into ``folder``; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, data in figures(report).items():
        (folder / name).write_bytes(data)
        paths.append(folder / name)
    return paths


def write_html(report: dict[str, Any], path: Path) -> None:
    """One page with the verdict, every table and every plot."""
    sections = [("Verdict", plots.paragraph(report["verdict"]["text"]))]
    sections += [(title, plots.html_table(columns, rows)) for title, columns, rows in tables(report)]
    sections += [
        (name.removesuffix(".png").replace("_", " "), plots.image(data, name)) for name, data in figures(report).items()
    ]
    path.write_text(plots.page(f"Routing of {report['model']}", sections), encoding="utf-8")
