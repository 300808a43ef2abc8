"""A batched job: many prompts, grouped by `--batching`, batch after batch in the order of their service."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrimoe.errors import PromptError
from hybrimoe.generation.batch.generate import (
    BatchPrompt,
    BatchReply,
    generate_batch,
    new_tokens,
    probe_batch,
    require_single,
)
from hybrimoe.generation.batch.prompts_file import PromptLine
from hybrimoe.generation.engine import TextGenerator
from hybrimoe.generation.prefix.blocks import PrefixTree
from hybrimoe.generation.sampling import SamplingOptions
from hybrimoe.generation.vocabulary import check_token_ids
from scheduler.batching import Batching, Request, ServiceCosts, ServiceOrder, expected_distinct, make_batches

if TYPE_CHECKING:
    from hybrimoe.runtime import Session

__all__ = ["BatchJob", "JobResult", "JobTotals", "job_prompts"]

Progress = Callable[[int, int, str], None]


class PredictsRoutes(Protocol):
    """Tells which experts replies will use: `hybrimoe.tracing.learning.RoutePredictor`, which is built on this."""

    def routes(self, generator: TextGenerator, prompts: Sequence[BatchPrompt]) -> NDArray[np.float64]:
        """Predicted route vectors of the replies, float64 [prompts, layers, experts]."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """One prompt's reply, the number of its batch in the order that they ran, and when it ended (us after the
    start)."""

    line: PromptLine
    n_prompt: int
    reply: BatchReply
    batch: int
    ended_us: float

    @property
    def late(self) -> bool:
        """Whether it had a deadline and missed it."""
        return self.line.deadline_ms is not None and self.ended_us > self.line.deadline_ms * 1e3


@dataclass(slots=True)
class JobTotals:
    """What the job did. Times are wall-clock us; `grouping_us` is the part that looked at routes and made batches.
    `routes`: where the routes that it grouped by came from, "predicted" or "recorded"; None for other groupings."""

    n_batches: int = 0
    n_run: int = 0
    total_us: float = 0.0
    grouping_us: float = 0.0
    results: list[JobResult] = field(default_factory=list)
    expected_distinct: float | None = None
    expected_distinct_in_order: float | None = None
    routes: str | None = None

    @property
    def new_tokens(self) -> int:
        """Tokens of all replies."""
        return sum(len(result.reply.token_ids) for result in self.results)


def job_prompts(generator: TextGenerator, lines: Sequence[PromptLine], name: str) -> list[BatchPrompt]:
    """The lines as tokens. Raises PromptError with the line of a prompt that leaves no room for a reply, or has a token
    that the model does not have."""
    prompts = []
    for line in lines:
        prompt = BatchPrompt(tuple(generator.encode(line.text)), line.max_new_tokens)
        try:
            generator.check_prompt(len(prompt.token_ids))
            check_token_ids(generator.model, prompt.token_ids, generator.tokenizer)
        except PromptError as error:
            raise PromptError(f"{name}:{line.line}: {error}") from error
        prompts.append(prompt)
    return prompts


class BatchJob:
    """Runs prompts in batches of at most `size`. `on_result` gets each reply as its batch ends.

    `predictor`: tells `expertflow` the routes of replies; without one the prompts' own are recorded by a prefill.
    `prefixes`: what earlier prompts computed, for batches of one. Raises ConfigError for batches of several prompts
    with speculation.
    """

    def __init__(
        self, generator: TextGenerator, session: Session | None, lines: Sequence[PromptLine],
        prompts: Sequence[BatchPrompt], options: SamplingOptions, batching: Batching, size: int,
        predictor: PredictsRoutes | None = None, prefixes: PrefixTree | None = None,
    ) -> None:  # fmt: skip
        if generator.pace is not None:
            require_single(size)
        self._generator, self._session = generator, session
        self._lines, self._prompts, self._options = lines, prompts, options.with_seed()
        self._batching, self._size, self._predictor = batching, size, predictor
        self._prefixes = prefixes
        self.totals = JobTotals()
        self._step_us: list[float] = []
        self._prompt_token_us = 0.0

    def run(
        self, should_stop: Callable[[], bool], on_result: Callable[[JobResult], None], progress: Progress
    ) -> JobTotals:
        """The whole job; stopped, it ends after the token under way and keeps what there is."""
        started = time.perf_counter_ns()
        totals = self.totals
        requests = [self._request(at) for at in range(len(self._prompts))]
        routes = self._routes(should_stop, progress) if self._batching == "expertflow" else None
        batches = make_batches(requests, self._batching, self._size, routes, self._options.seed or 0)
        order = ServiceOrder(requests, batches, routes)
        totals.n_batches, totals.grouping_us = len(batches), _since(started)
        if routes is not None:
            totals.routes = "recorded" if self._predictor is None else "predicted"
            in_order = make_batches(requests, "none", self._size)
            totals.expected_distinct = expected_distinct(routes, batches)
            totals.expected_distinct_in_order = expected_distinct(routes, in_order)
        if self._session is not None:
            self._session.reset_stats()
        while len(order) and not should_stop():
            batch = order.next(_since(started), self._costs())
            self._run(batch, started, should_stop, on_result)
            progress(len(totals.results), len(self._prompts), "prompts")
        totals.total_us = _since(started)
        return totals

    def _run(
        self, batch: Sequence[int], started: int, should_stop: Callable[[], bool],
        on_result: Callable[[JobResult], None],
    ) -> None:  # fmt: skip
        prompts = [self._prompts[at] for at in batch]
        ends = [time.perf_counter_ns()]
        replies = generate_batch(
            self._generator, prompts, self._options, should_stop, lambda: ends.append(time.perf_counter_ns()),
            self._prefixes,
        )  # fmt: skip
        if len(ends) > 1:
            self._prompt_token_us = (ends[1] - ends[0]) / 1e3 / sum(len(prompt.token_ids) for prompt in prompts)
        self._step_us += (np.diff(ends[1:]) / 1e3).tolist()
        for at, reply in zip(batch, replies, strict=True):
            ended_us = (ends[len(reply.token_ids)] - started) / 1e3
            result = JobResult(self._lines[at], len(self._prompts[at].token_ids), reply, self.totals.n_run, ended_us)
            self.totals.results.append(result)
            on_result(result)
        self.totals.n_run += 1

    def _request(self, at: int) -> Request:
        line, prompt = self._lines[at], self._prompts[at]
        deadline_us = math.inf if line.deadline_ms is None else line.deadline_ms * 1e3
        return Request(
            len(prompt.token_ids), new_tokens(self._generator, prompt, self._options), line.priority, deadline_us
        )

    def _routes(self, should_stop: Callable[[], bool], progress: Progress) -> NDArray[np.float64]:
        """Route vectors of all prompts: predicted, or from their prefill in batches of like length; zeros where
        stopped."""
        if self._predictor is not None:
            return self._predictor.routes(self._generator, self._prompts)
        by_length = sorted(range(len(self._prompts)), key=lambda at: (len(self._prompts[at].token_ids), at))
        routes: NDArray[np.float64] | None = None
        for first in range(0, len(by_length), self._size):
            if routes is not None and should_stop():
                break
            part = by_length[first : first + self._size]
            found = probe_batch(self._generator, [self._prompts[at] for at in part])
            if routes is None:
                routes = np.zeros((len(self._prompts), *found.shape[1:]))
            routes[part] = found
            progress(min(first + self._size, len(by_length)), len(by_length), "routes")
        assert routes is not None
        return routes

    def _costs(self) -> ServiceCosts:
        """As measured so far."""
        costs = None if self._session is None else self._session.costs
        return ServiceCosts(
            prompt_token_us=self._prompt_token_us,
            step_us=float(np.median(self._step_us)) if self._step_us else 0.0,
            expert_us=0.0 if costs is None else costs.transfer_us(0),
        )


def _since(started: int) -> float:
    return (time.perf_counter_ns() - started) / 1e3
