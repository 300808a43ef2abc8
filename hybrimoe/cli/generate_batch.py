"""`hybrimoe generate --prompts`: a batched job, its replies as JSON Lines in the order of the file, and a summary."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hybrimoe.cli.views import render, render_summary

if TYPE_CHECKING:
    from hybrimoe.cli.shared.opening import OpenModel
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation import SamplingOptions
    from hybrimoe.generation.batch.job import JobResult, JobTotals
    from hybrimoe.generation.batch.plan import JobPlan
    from hybrimoe.tracing.learning.route_predictor import RoutePredictor

DEFAULT_BATCH = 8
"""Prompts at once where nothing else says how many."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How the job was asked for. `name`: the prompts' file, - for stdin; `route_predictor`: for expertflow."""

    name: str
    batching: str
    batch_size: int | None
    quiet: bool
    as_json: bool
    route_predictor: Path | None = None


def run(deployment: DeployConfig, text: str, options: SamplingOptions, job: JobOptions) -> bool:
    """Runs the prompts in `text`. Returns whether Ctrl-C ended it."""
    from hybrimoe.errors import ConfigError
    from hybrimoe.generation.batch.prompts_file import read_prompts
    from scheduler.batching import batching_kind

    kind = batching_kind(job.batching)
    if job.route_predictor is not None and kind != "expertflow":
        raise typer.BadParameter("--route-predictor is what --batching expertflow groups by: give both")
    if deployment.generation.context_shift:
        raise ConfigError(
            "generation.context_shift is for single replies: the prompts of --prompts end at the context; leave it out"
        )
    lines = read_prompts(text, job.name)
    from hybrimoe.cli.shared.opening import open_model, progress_bar
    from hybrimoe.cli.shared.states import kept_prefixes
    from hybrimoe.generation import interruptible
    from hybrimoe.generation.batch.job import BatchJob, job_prompts

    predictor = _predictor(job.route_predictor)
    with open_model(deployment, show_progress=not job.quiet) as opened, ExitStack() as ending:
        prompts = job_prompts(opened.generator, lines, job.name)
        plan = _plan(opened, prompts, options, job) if kind == "moe-lightning" else None
        size = (job.batch_size or DEFAULT_BATCH) if plan is None else plan.plan.batch
        tree = ending.enter_context(kept_prefixes(opened)) if size == 1 else None
        work = BatchJob(opened.generator, opened.session, lines, prompts, options, kind, size, predictor, tree)
        writer = _Writer(silent=job.as_json, order=[line.line for line in lines])
        with interruptible() as interrupt, progress_bar(not job.quiet, beginning="first batch") as progress:
            try:
                totals = work.run(interrupt, writer.add, progress)
            finally:
                writer.finish()
        _report(opened, totals, job, plan, size, len(lines))
    return interrupt.pressed


def _plan(opened: OpenModel, prompts: Any, options: SamplingOptions, job: JobOptions) -> JobPlan:
    from hybrimoe.checkpoint.meta import model_shape
    from hybrimoe.generation.batch.plan import plan_job

    shape = model_shape(opened.config.model, opened.config.vision, opened.config.rope)
    return plan_job(opened.generator, opened.session, shape, prompts, options, job.batch_size)


def _predictor(path: Path | None) -> RoutePredictor | None:
    if path is None:
        return None
    from hybrimoe.tracing.learning.route_predictor import RoutePredictor

    return RoutePredictor(path)


class _Writer:
    """Writes replies in the order of the file, each as soon as those before it are there."""

    def __init__(self, silent: bool, order: list[int]) -> None:
        self._silent, self._order = silent, order
        self._waiting: dict[int, JobResult] = {}

    def add(self, result: JobResult) -> None:
        self._waiting[result.line.line] = result
        while self._order and self._order[0] in self._waiting:
            self._write(self._waiting.pop(self._order.pop(0)))

    def finish(self) -> None:
        """What waits behind a prompt that never ran (after Ctrl-C), still in order."""
        for line in sorted(self._waiting):
            self._write(self._waiting[line])

    def _write(self, result: JobResult) -> None:
        if not self._silent:
            render.emit_json_line(result_as_dict(result))


def result_as_dict(result: JobResult) -> dict[str, Any]:
    """One reply as plain data; `ended_ms` is measured from the job's start."""
    line, reply = result.line, result.reply
    return {
        "line": line.line,
        "id": line.id,
        "prompt": line.text,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": result.n_prompt,
        "new_tokens": len(reply.token_ids),
        "batch": result.batch,
        "ended_ms": result.ended_us / 1e3,
        **({} if line.deadline_ms is None else {"late": result.late}),
    }


def _report(
    opened: OpenModel, totals: JobTotals, job: JobOptions, plan: JobPlan | None, size: int, n_prompts: int
) -> None:
    experts = opened.stats()
    summary = {
        "model": opened.name,
        "prompts": n_prompts,
        "ended": sum(result.reply.finish_reason != "interrupted" for result in totals.results),
        "late": sum(result.late for result in totals.results),
        "batching": job.batching,
        "batch_size": size,
        "batches": totals.n_batches,
        "prompt_tokens": sum(result.n_prompt for result in totals.results),
        "new_tokens": totals.new_tokens,
        "us": totals.total_us,
        "grouping_us": totals.grouping_us,
        "tokens_per_s": totals.new_tokens / totals.total_us * 1e6 if totals.total_us else None,
        "distinct_experts": None if experts is None else _distinct(experts["decode"]),
        "routes": totals.routes,
        "expected_distinct": totals.expected_distinct,
        "expected_distinct_in_order": totals.expected_distinct_in_order,
        "plan": None if plan is None else asdict(plan.plan) | {"hardware": plan.hardware},
        "experts": experts,
        "provenance": render_summary.provenance(experts),
    }
    if job.as_json:
        results = sorted(totals.results, key=lambda result: result.line.line)
        render.emit_json({"results": [result_as_dict(result) for result in results], "summary": summary})
    elif not job.quiet:
        for line in summary_lines(summary):
            render.note(line)


def _distinct(counters: dict[str, Any]) -> float | None:
    """Distinct experts of one layer in one decode step, mean."""
    return counters["activated"] / counters["calls"] if counters["calls"] else None


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    rate = render_summary.rate(summary["tokens_per_s"])
    lines = [
        f"job      {summary['ended']} of {summary['prompts']} prompts ended, {summary['batches']} batches of at most "
        f"{summary['batch_size']} ({summary['batching']})",
        f"speed    {summary['new_tokens']} new tokens in {render_summary.ms(summary['us'])}: {rate} "
        f"({summary['provenance']}; {render_summary.ms(summary['grouping_us'])} of it for grouping)",
    ]
    if summary["late"]:
        lines.append(f"late     {summary['late']} prompts missed their deadline")
    experts, distinct = summary["experts"], summary["distinct_experts"]
    if distinct is not None:
        hits = render_summary.percent(experts["decode"]["hit_rate"])
        lines.append(f"experts  {distinct:.2f} distinct ones a layer and decode step; hit rate in decode {hits}")
    if summary["expected_distinct"] is not None:
        before, after = summary["expected_distinct_in_order"], summary["expected_distinct"]
        told = f"{before:.2f} in file order, {after:.2f} as grouped"
        lines.append(f"routes   {summary['routes']}; expected distinct experts: {told}")
    if summary["plan"] is not None:
        lines += _plan_lines(summary["plan"])
    return lines


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    """MoE-Lightning's choice. Its speed is the model's: told as such, never beside the measured one."""
    return [
        f"plan     {plan['n_micro_batches']} micro-batches of {plan['micro_batch']}, attention on the "
        f"{plan['attention']}; a model of the hardware, not a measurement",
        f"         {plan['hardware']}",
    ]
