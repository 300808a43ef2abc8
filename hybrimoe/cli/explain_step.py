"""`hybrimoe explain-step`: why one step was scheduled as it was, and what would make it faster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrimoe.cli.shared import simulated
from hybrimoe.cli.shared.files import check_writable, writing
from hybrimoe.cli.shared.groups import grouped
from hybrimoe.cli.shared.options import JsonOption, TimelineOption
from hybrimoe.cli.views import render

#: Layers whose decisions are listed in the terminal (the slowest ones); --json has all.
SHOWN_LAYERS = 3


def register(app: typer.Typer) -> None:
    """Add `explain-step`."""
    app.command("explain-step")(grouped(explain_step))


def explain_step(
    *,
    setting: simulated.SettingGroup,
    policy: simulated.PolicyOption = "ours",
    cache_ratio: simulated.CacheRatioOption = 0.25,
    step: Annotated[int, typer.Option(min=0, help="Which step of the simulated sequences, from 0.")] = 16,
    accelerators: simulated.AcceleratorsOption = None,
    host_ratio: simulated.HostRatioOption = 1.0,
    timeline: TimelineOption = False,
    chrome: Annotated[
        Path | None, typer.Option("--chrome", metavar="FILE", help="Write a Chrome/Perfetto trace.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show each decision's alternatives, the critical path, idle lanes, and what more of a resource would bring."""
    setting.check()
    check_writable(chrome)
    from hybrimoe.tracing.study.step import explain_step as explained
    from scheduler.graph import chrome_trace

    report = explained(
        setting.trace,
        setting.hardware,
        setting.model_shape,
        policy,
        cache_ratio,
        step,
        setting.seed,
        accelerators,
        host_ratio,
    )
    for text in report.facts["notes"]:
        render.note(text)
    if chrome is not None:
        label = f"{report.facts['model_shape']}, {policy}, step {step} (simulated)"
        with writing(chrome):
            chrome.write_text(json.dumps(chrome_trace(report.records, label)), encoding="utf-8")
    if as_json:
        render.emit_json(report.facts)
        return
    _show(report.facts)
    if timeline:
        from hybrimoe.cli.views.render_timeline import timeline as drawn

        render.out().print(drawn(report.records, label="simulated", phase=report.facts["phase"]))


def _show(facts: dict[str, Any]) -> None:
    out = render.out()
    where = f"{facts['model_shape']} on {facts['hardware']}, {facts['policy']}, {facts['cache_ratio']:.0%} cached"
    took = f"{facts['latency_us'] / 1e3:.2f} ms (simulated)"
    out.print(f"Step {facts['step']} ({facts['phase']}, {facts['tokens']} tokens): {took}. {where}")
    out.print()
    slowest = sorted(facts["layers"], key=lambda layer: (-layer["makespan_us"], layer["layer"]))[:SHOWN_LAYERS]
    for layer in slowest:
        _show_layer(layer)
    for title, column, found in (
        ("Critical path", "task", facts["critical_path_us"]),
        ("Idle", "lane", facts["idle_us"]),
    ):
        rows = [(name, f"{us:.0f}", f"{us / facts['graph_makespan_us']:.0%}") for name, us in found.items()]
        out.print(render.table(title, (column, "us", "share"), rows))
    brings = [(name, f"{us:+.1f}") for name, us in facts["would_bring_us"].items()]
    out.print(render.table("Would save on this step", ("", "us"), brings))


def _show_layer(layer: dict[str, Any]) -> None:
    rows = [
        (f"E{d['expert']}", d["n_tokens"], "yes" if d["resident"] else "no", f"{d['cpu_us']:.0f}",
         f"{d['accel_us']:.0f}", f"{d['transfer_us']:.0f}", _waited(d["wait_us"]), d["lane"])
        for d in layer["decisions"]
    ]  # fmt: skip
    others = ", ".join(f"{name} {us:.0f}" for name, us in layer["alternatives"][:4])
    title = f"Layer {layer['layer']}: {layer['makespan_us']:.0f} us (balance alone: {others} us)"
    columns = ("expert", "tokens", "resident", "CPU us", "accel us", "transfer us", "disk us", "runs on")
    render.out().print(render.table(title, columns, rows))
    render.out().print()


def _waited(wait_us: float | None) -> str:
    """How long an expert is read from disk."""
    if wait_us is None:
        return "not read"
    return f"{wait_us:.0f}" if wait_us else "-"
