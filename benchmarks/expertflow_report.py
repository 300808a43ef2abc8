"""Measures ExpertFlow's grouping on the demo model and writes the table of docs/batching.md.

python benchmarks/expertflow_report.py --quick       # a few prompts; prints, writes nothing
python benchmarks/expertflow_report.py               # minutes; replaces what stands between the marks

Prompts are windows of the demo model's held-out text. Two of three blocks of windows are continued by the model and
recorded, and the predictor learns from them; the others, shuffled, are the job, which the batched generator runs once
for each grouping. Distinct experts are counted by the runtime while the job runs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hybrimoe.cli.shared.opening import OpenModel, open_model
from hybrimoe.config.deploy import load_config
from hybrimoe.demo import HELD_OUT_FILE, demo_model_path
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.generation.batch.generate import BatchPrompt
from hybrimoe.generation.batch.job import BatchJob
from hybrimoe.generation.batch.prompts_file import PromptLine
from hybrimoe.tracing.learning.learn_routes import TARGET, train_routes
from hybrimoe.tracing.learning.route_predictor import RoutePredictor
from hybrimoe.tracing.record import listening

DOC = Path(__file__).resolve().parents[1] / "docs" / "batching.md"
BEGIN, END = "<!-- expertflow:begin (python benchmarks/expertflow_report.py) -->", "<!-- expertflow:end -->"
PROMPT_TOKENS, NEW_TOKENS, BATCH = 24, 48, 8
BLOCK, JOB_EVERY = 6, 3
"""Windows in a block, and of how many blocks one is the job's: neighbours in the text are not on both sides."""
OPTIONS = SamplingOptions(max_new_tokens=NEW_TOKENS, temperature=0.8, seed=0)


@dataclass(frozen=True, slots=True)
class Row:
    """One grouping of one job: distinct experts of a layer and decode step, us until the batches were made."""

    name: str
    distinct: float
    grouping_us: float
    total_us: float


def main() -> None:
    """Record, train, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few prompts; prints, writes nothing")
    parser.add_argument("--jobs", type=int, default=4, help="jobs of the same prompts, shuffled")
    arguments = parser.parse_args()
    with open_model(load_config(None, accelerator="none"), show_progress=False) as opened:
        training, job = windows(opened.generator, BLOCK * JOB_EVERY * 2 if arguments.quick else None)
        with tempfile.TemporaryDirectory() as folder:
            facts, predictor = trained(opened.generator, training, Path(folder) / "routes.onnx")
            rows = [row for seed in range(arguments.jobs) for row in measured(opened, job, predictor, seed)]
    section = report(rows, len(job), facts)
    if arguments.quick:
        print(section)
        return
    before, rest = DOC.read_text(encoding="utf-8").split(BEGIN)
    DOC.write_text(f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def windows(generator: TextGenerator, limit: int | None) -> tuple[list[BatchPrompt], list[BatchPrompt]]:
    """Prompts for the training and for the job."""
    ids = generator.encode((demo_model_path() / HELD_OUT_FILE).read_text(encoding="utf-8"))
    starts = range(0, len(ids) - PROMPT_TOKENS + 1, PROMPT_TOKENS)[:limit]
    sides: tuple[list[BatchPrompt], list[BatchPrompt]] = ([], [])
    for at, start in enumerate(starts):
        in_job = at // BLOCK % JOB_EVERY == JOB_EVERY - 1
        sides[in_job].append(BatchPrompt(tuple(ids[start : start + PROMPT_TOKENS])))
    return sides


def trained(
    generator: TextGenerator, prompts: Iterable[BatchPrompt], out: Path
) -> tuple[dict[str, Any], RoutePredictor]:
    """Records a reply to each prompt and learns from them."""
    with listening(generator.model, embeddings=True) as tap:
        for prompt in prompts:
            tap.begin_sequence()
            for _ in generator.reply(list(prompt.token_ids), OPTIONS):
                pass
        trace = tap.trace("demo", "Apache-2.0")
    return train_routes([trace], TARGET, out), RoutePredictor(out)


def measured(opened: OpenModel, prompts: Sequence[BatchPrompt], predictor: RoutePredictor, seed: int) -> list[Row]:
    """The shuffled job under each grouping."""
    order = np.random.default_rng(seed).permutation(len(prompts))[: len(prompts) // BATCH * BATCH]
    job = [prompts[at] for at in order.tolist()]
    lines = [PromptLine(at, "") for at in range(len(job))]
    rows = []
    groupings: tuple[tuple[str, Literal["none", "expertflow"], RoutePredictor | None], ...] = (
        ("order of the file", "none", None),
        ("routes of a recorded prefill", "expertflow", None),
        ("predicted routes", "expertflow", predictor),
    )
    for name, kind, net in groupings:
        work = BatchJob(opened.generator, opened.session, lines, job, OPTIONS, kind, BATCH, net)
        totals = work.run(lambda: False, lambda _: None, lambda *_: None)
        experts = opened.stats()
        assert experts is not None
        decode = experts["decode"]
        rows.append(Row(name, decode["activated"] / decode["calls"], totals.grouping_us, totals.total_us))
    return rows


def report(rows: Sequence[Row], n_prompts: int, facts: dict[str, Any]) -> str:
    """What goes between the marks."""
    n_jobs = sum(row.name == rows[0].name for row in rows)
    text = (
        f"Demo model, {n_prompts // BATCH * BATCH} prompts of {PROMPT_TOKENS} tokens from its held-out text,"
        f" {NEW_TOKENS} new tokens each (temperature 0.8), batches of {BATCH};\nmean and standard error of {n_jobs}"
        " shuffled jobs, counted by the runtime (measured, CPU only; the times on a shared machine). The\npredictor"
        f" learned from {facts['examples']:,} windows of replies to other prompts; on replies that it did not see, its"
        f" routes correlate\n{facts['correlation']:.2f} with the real ones, those of the prompts' own prefill"
        f" {facts['correlation_of_the_prompts_routes']:.2f}."
    )
    columns = ("batches by", "distinct experts of a layer and decode step", "ms for grouping")
    cells = []
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        distinct = np.array([row.distinct for row in own])
        error = distinct.std(ddof=1) / len(own) ** 0.5 if len(own) > 1 else 0.0
        grouping_ms = float(np.median([row.grouping_us for row in own])) / 1e3
        cells.append((name, f"{distinct.mean():.2f} ± {error:.2f}", f"{grouping_ms:.0f}"))
    lines = [columns, tuple("---" for _ in columns), *cells]
    return text + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
