"""`hybrimoe simulate`: policies side by side on a trace, a hardware profile and a model shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli.shared import simulated
from hybrimoe.cli.shared.files import check_readable
from hybrimoe.cli.shared.groups import grouped
from hybrimoe.cli.shared.options import JsonOption, LossyList
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.tracing.study.simulation import SimulationReport
    from scheduler.simulator.simulator import PhaseResult

DEFAULT_POLICIES = ("static", "hybrimoe", "ours", "oracle")
DEFAULT_RATIO = 0.25
DEFAULT_TOKENS = 2000

PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        help="A preset, balance/prefetch/cache, or FILE.py; :name=value sets parameters. Repeatable.",
    ),
]
RatioOption = Annotated[
    list[float] | None,
    typer.Option("--cache-ratio", metavar="R", help="Share of all experts that has a slot; repeatable."),
]


def register(app: typer.Typer) -> None:
    """Add `simulate`."""
    app.command("simulate")(grouped(simulate))


def simulate(
    *,
    setting: simulated.SettingGroup,
    policy: PolicyOption = None,
    cache_ratio: RatioOption = None,
    lossy: LossyList = None,
    phase: Annotated[
        str | None, typer.Option(help="prefill or decode only. Default: both, where the trace has them.")
    ] = None,
    expert_dtype: simulated.ExpertDtypeOption = "int4",
    dense_dtype: simulated.DenseDtypeOption = "int8",
    predictions: Annotated[
        str,
        typer.Option(
            help="Routing known ahead: auto, recorded, transition, hidden, residual, token, noisy, or none.",
        ),
    ] = "auto",
    lookahead: Annotated[int, typer.Option(min=0, help="Layers ahead that are predicted.")] = 3,
    max_tokens: Annotated[
        int, typer.Option(help="Simulate at most so many tokens, of --phase if that is given; 0: all.")
    ] = DEFAULT_TOKENS,
    host_ratio: simulated.HostRatioOption = 1.0,
    disk_blind: Annotated[
        bool, typer.Option("--disk-blind", help="Plan as if every expert were in host memory, for comparison.")
    ] = False,
    accelerators: simulated.AcceleratorsOption = None,
    shared_link: Annotated[bool, typer.Option("--shared-link", help="All accelerators behind one link.")] = False,
    stream: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Experts of prompts of N tokens and more go past the slots; 0: none. Default: policy's."
        ),
    ] = None,
    stream_ahead: Annotated[
        bool, typer.Option("--stream-ahead", help="Streamed prompts: upload a layer while the one before is computed.")
    ] = False,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(metavar="N", help="Prompts in steps of N tokens, one after another. Default: each as one step."),
    ] = None,
    cache_model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Net of `trace train --target cache`, for learned caches.")
    ] = None,
    prefetch_model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Net of `trace train --target prefetch`, for learned prefetch.")
    ] = None,
    bound: Annotated[
        bool,
        typer.Option("--bound", help="Also a time that no policy can beat (a lower bound; perhaps none reaches it)."),
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Instead: follow a run recorded by `trace capture` and compare, plan by plan."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate policies on a trace. The first quarter of its sequences is the profile, the others are simulated."""
    for path in (replay, cache_model, prefetch_model):
        check_readable(path)
    if replay is not None:
        _replay(replay, as_json=as_json)
        return
    setting.check()
    from hybrimoe.tracing.study.simulation import SimulationRequest, run_simulations

    request = SimulationRequest(
        trace=setting.trace,
        hardware=setting.hardware,
        model_shape=setting.model_shape,
        policies=tuple(policy or DEFAULT_POLICIES),
        cache_ratios=tuple(cache_ratio or (DEFAULT_RATIO,)),
        lossy=tuple(lossy or ()),
        phase=phase,
        expert_dtype=expert_dtype,
        dense_dtype=dense_dtype,
        predictions=predictions,
        lookahead=lookahead,
        max_tokens=max_tokens,
        host_ratio=host_ratio,
        disk_blind=disk_blind,
        accelerators=accelerators,
        shared_link=shared_link,
        stream=stream,
        stream_ahead=stream_ahead,
        prefill_chunk=prefill_chunk,
        seed=setting.seed,
        cache_model=cache_model,
        prefetch_model=prefetch_model,
        bound=bound,
    )
    report = run_simulations(request)
    for text in report.notes:
        render.note(text)
    if as_json:
        render.emit_json(report.rows())
    else:
        _show(report.results, report.title)
        _show_bounds(report)
        _show_ranges(report)


COLUMNS = ("policy", "slots", "phase", "ms", "gain", "hits", "CPU", "acc", "link", "copies", "prefetched")
BOUND_COLUMNS = ("policy", "slots", "phase", "ms", "bound", "of the way")
RANGE_COLUMNS = ("policy", "slots", "phase", "tokens/s", "to expect")


def _show(results: list[PhaseResult], title: str) -> None:
    base: dict[tuple[Any, ...], float] = {}
    rows = []
    for r in results:
        first = base.setdefault((r.cache_ratio, r.phase), r.latency_ms)
        ahead = f"{r.prefetches} ({r.prefetch_precision:.0%})" if r.prefetches else "-"
        rows.append(
            (_name(r), f"{r.cache_ratio:.0%}", r.phase, f"{r.latency_ms:.2f}", f"{first / r.latency_ms:.2f}x",
             f"{r.hit_rate:.1%}", f"{r.cpu_busy:.0%}", f"{r.accel_busy:.0%}", f"{r.link_busy:.0%}", r.transfers,
             ahead)
        )  # fmt: skip
    render.out().print(render.table(title, COLUMNS, rows))


def _show_bounds(report: SimulationReport) -> None:
    """What no policy can beat, and which share of the way from the first policy to there the others go."""
    if not report.bounds:
        return
    rows = []
    first: dict[tuple[Any, ...], float] = {}
    for r in report.results:
        begin, bound = first.setdefault((r.cache_ratio, r.phase), r.latency_ms), report.bounds[r.cache_ratio, r.phase]
        way = (begin - r.latency_ms) / (begin - bound) if begin > bound else 0.0
        rows.append((_name(r), f"{r.cache_ratio:.0%}", r.phase, f"{r.latency_ms:.2f}", f"{bound:.2f}", f"{way:.0%}"))
    render.out().print(render.table("What no policy can beat (a lower bound, simulated)", BOUND_COLUMNS, rows))


def _show_ranges(report: SimulationReport) -> None:
    """The speeds, and what public measurements say of each; nothing where they say nothing of any."""
    if not any(report.ranges):
        return
    rows = [
        (_name(r), f"{r.cache_ratio:.0%}", r.phase, f"{r.tokens_per_s:.4g}",
         "no measurement is near" if bounds is None else f"{bounds[0]:.4g} to {bounds[1]:.4g}")
        for r, bounds in zip(report.results, report.ranges, strict=True)
    ]  # fmt: skip
    render.out().print(render.table("Range by public measurements (docs/calibration.md)", RANGE_COLUMNS, rows))


def _name(result: PhaseResult) -> str:
    """The policy, and the kind of the lossy one with the share of routed experts that it changed."""
    if not result.lossy:
        return result.policy
    return f"{result.policy} + {result.lossy.split(' ')[0]} ({result.changed:.0%})"


def _replay(path: Path, *, as_json: bool) -> None:
    """Exit code 1 where the replay differs from the run."""
    from hybrimoe.tracing.replay import replay_file

    found = replay_file(path)
    if as_json:
        render.emit_json(found)
    else:
        _show_replay(found)
    if not found["exact"]:
        raise typer.Exit(1)


def _show_replay(found: dict[str, Any]) -> None:
    out = render.out()
    verdict = "exact: every plan, transfer and hit is reproduced" if found["exact"] else "NOT exact"
    out.print(f"{found['file']}: {verdict}")
    rows = [(name, str(found[name])) for name in ("plans", "transfers", "prefetches")]
    rows.append(("hits", f"{found['hits']} of {found['activated']} ({found['hit_rate']:.1%})"))
    for phase, times in found["phases"].items():
        told = f"recorded {times['recorded_us']:.0f} us ({found['facts']['lanes']})"
        rows.append((f"{phase}, {times['steps']} steps", told))
        rows.append(("  with recorded durations and waits", f"{times['replayed_us']:.0f} us (simulated)"))
        rows.append(("  with recorded durations alone", f"{times['durations_us']:.0f} us (simulated)"))
    out.print(render.table("Replay", ("", ""), rows))
    first = found["divergence"]
    if first is not None:
        out.print(
            f"First difference: step {first['step']}, layer {first['layer']}, {first['what']}: recorded "
            f"{first['recorded']}, replayed {first['replayed']}. {first['why']}", markup=False, soft_wrap=True,
        )  # fmt: skip
        then, now = found["facts"].get("versions"), found["versions"]
        if then != now:
            out.print(f"Recorded by {then}, replayed by {now}.", markup=False, soft_wrap=True)
