"""`hybrimoe bench batching`: groupings of batched prompts on a trace (simulated)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.shared import simulated
from hybrimoe.cli.shared.groups import grouped
from hybrimoe.cli.shared.options import JsonOption
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.bench.batching import BatchingReport


def register(app: typer.Typer) -> None:
    """Add `batching`."""
    app.command("batching")(grouped(batching))


def batching(
    *,
    setting: simulated.SettingGroup,
    policy: simulated.PolicyOption = "ours",
    cache_ratio: simulated.CacheRatioOption = 0.25,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once (moe-lightning: its own plan).")] = 6,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sequence that are its prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens after them that are its reply.")] = 64,
    sequences: Annotated[int, typer.Option(min=2, help="Sequences of a synthetic trace.")] = 24,
    as_json: JsonOption = False,
) -> None:
    """Compare groupings of a trace's sequences: distinct experts a step, speed, hit rate. All simulated, all lossless.

    expertflow groups by the routes of the prompts; "replies known" groups by the routes of the replies instead, what a
    perfect predictor would tell. moe-lightning runs as many prompts at once as its model of the hardware finds best.
    """
    setting.check()
    from hybrimoe.bench.batching import BatchingRequest, compare

    request = BatchingRequest(
        setting.trace, setting.hardware, setting.model_shape, policy, cache_ratio, batch_size, prompt_tokens,
        new_tokens, sequences, setting.seed,
    )  # fmt: skip
    report = compare(request)
    for note in report.notes:
        render.note(note)
    if as_json:
        render.emit_json(report.as_dict())
    else:
        _show(report)


COLUMNS = ("grouping", "batch", "distinct", "expected", "decode tok/s", "prefill tok/s", "hits", "transfers")


def _show(report: BatchingReport) -> None:
    rows = [
        (row.grouping, row.batch, f"{row.counted_distinct:.2f}", f"{row.expected_distinct:.2f}",
         f"{row.decode_tokens_per_s:.1f}", f"{row.prefill_tokens_per_s:.0f}", f"{row.hit_rate:.1%}", row.transfers)
        for row in report.rows
    ]  # fmt: skip
    render.out().print(render.table(report.title, COLUMNS, rows))
    plan = report.plan
    render.note(
        f"moe-lightning: {plan.n_micro_batches} micro-batches of {plan.micro_batch}, attention: {plan.attention}, bound"
        f" by the {plan.stages.bound_by}; by its own model {plan.tokens_per_s:.0f} new tokens/s"
    )
