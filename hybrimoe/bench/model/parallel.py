"""What a batch of replies brings: tokens a second of 1, 2, 4 ... replies side by side, by the engine of the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from hybrimoe.bench import rounds as harness
from hybrimoe.bench.model.sources import CheckpointSource, RandomSource
from hybrimoe.errors import ModelError
from hybrimoe.machine.facts import machine

if TYPE_CHECKING:
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation import TextGenerator

Progress = Callable[[int, int, str], None]

PROMPT_TOKENS = (48, 33, 64, 41)
"""Lengths of the prompts, in turn: no two beside each other are equally long."""


@dataclass(frozen=True, slots=True)
class Request:
    """One command line of `bench parallel`. model: None is the demo; or a shape with so many layers. replies: numbers
    of replies at once."""

    model: str | None
    shape: str | None
    layers: int | None
    deployment: DeployConfig
    replies: tuple[int, ...]
    new_tokens: int
    rounds: int


@dataclass(slots=True)
class _Counted:
    """Of all measured rounds with one number of replies: steps, their time by part, activated experts."""

    steps: int = 0
    experts: int = 0
    parts: dict[str, int] = field(default_factory=dict)


def measure(request: Request, progress: Progress) -> dict[str, Any]:
    """Tokens a second, and what a step consists of, for each number of replies, as plain data.

    Raises ModelError where a reply in a batch is another one than alone: figures would mean nothing.
    """
    from hybrimoe.generation import TextGenerator

    source = CheckpointSource(request.model) if request.shape is None else RandomSource(request.shape, request.layers)
    model = source.hybrid(request.deployment, progress)
    try:
        generator = TextGenerator(model, source.tokenizer)
        rows = _Rows(generator, _prompts(request, source.vocab_size), request.new_tokens)
        numbers = {str(n): n for n in request.replies}
        timed = harness.alternate(numbers, rows.tokens_per_s, request.rounds, progress=progress)
    finally:
        model.hybrimoe.session.close()
    first = harness.spread(timed[str(request.replies[0])])["median"]
    return {
        "bench": "parallel",
        "model": request.shape or request.model or "demo",
        "weights": "random" if request.shape else "checkpoint",
        "layers": len(model.hybrimoe.session.layer_specs()),
        "expert_dtype": model.hybrimoe.session.config.expert_dtype,
        "dense_dtype": request.deployment.cpu.dense_dtype,
        "in_turn": rows.in_turn,
        "new_tokens": request.new_tokens,
        "rounds": request.rounds,
        "machine": machine(),
        "rows": [rows.row(n, timed[str(n)], first) for n in request.replies],
    }


def _prompts(request: Request, vocab_size: int) -> list[list[int]]:
    """A prompt for each reply: of the package's held-out text, or random tokens for a random model."""
    import numpy as np

    lengths = list(islice(cycle(PROMPT_TOKENS), max(request.replies)))
    if request.shape is None:
        from hybrimoe.checkpoint import load_tokenizer
        from hybrimoe.demo import HELD_OUT_FILE, demo_model_path

        text = (demo_model_path() / HELD_OUT_FILE).read_text(encoding="utf-8")
        ids = list(load_tokenizer(request.model)(text)["input_ids"])
    else:
        ids = [int(token) for token in np.random.default_rng(0).integers(3, vocab_size, sum(lengths))]
    endless = cycle(ids)
    return [list(islice(endless, length)) for length in lengths]


class _Rows:
    """Measures numbers of replies on one generator, and counts what the steps consist of."""

    def __init__(self, generator: TextGenerator, prompts: Sequence[list[int]], new_tokens: int) -> None:
        from hybrimoe.generation import SamplingOptions
        from hybrimoe.generation.continuous_batching import BatchEngine

        self._generator, self._prompts = generator, prompts
        self._options = SamplingOptions(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
        self._counted: dict[int, _Counted] = {}
        self._alone: dict[int, list[int]] = {}
        self.in_turn = BatchEngine(generator).in_turn

    def tokens_per_s(self, n_replies: int) -> float:
        """Of all replies together, from the moment on when each has its first token."""
        from hybrimoe.generation.continuous_batching import BatchEngine

        engine = BatchEngine(self._generator, parallel=n_replies)
        replies = [engine.admit(prompt, self._options, lambda: False) for prompt in self._prompts[:n_replies]]
        while not all(reply.token_ids for reply in replies):
            list(engine.step())
        before, n_before, began = self._meter(), _n_tokens(replies), time.perf_counter()
        n_steps = engine.n_steps
        while engine.n_running == n_replies:
            list(engine.step())
        seconds, n_tokens = time.perf_counter() - began, _n_tokens(replies) - n_before
        self._count(n_replies, before, engine.n_steps - n_steps)
        while engine.n_running:
            list(engine.step())
        self._check(replies)
        return n_tokens / seconds

    def row(self, n_replies: int, values: Sequence[float], first: float) -> dict[str, Any]:
        """One number of replies. first: tokens a second of the first row. experts: distinct, of a layer and step."""
        counted, tokens_per_s = self._counted[n_replies], harness.spread(values)
        ticks = sum(counted.parts.values())
        return {
            "replies": n_replies,
            "tokens_per_s": tokens_per_s,
            "gain": tokens_per_s["median"] / first,
            "step_ms": 1e3 * n_replies / tokens_per_s["median"],
            "experts": counted.experts / max(1, counted.steps) if ticks else None,
            "parts": {part: count / ticks for part, count in counted.parts.items()} if ticks else {},
        }

    def _check(self, replies: Sequence[Any]) -> None:
        """Raises ModelError where a reply is another one than the first reply of its prompt, which was alone."""
        for number, reply in enumerate(replies):
            if number not in self._alone:
                alone = self._generator.reply(self._prompts[number], self._options)
                "".join(alone)
                self._alone[number] = alone.token_ids
            if reply.token_ids != self._alone[number]:
                raise ModelError(
                    f"reply {number + 1} of {len(replies)} side by side is another one than alone, so figures would"
                    f" mean nothing: {reply.token_ids[:8]} and {self._alone[number][:8]}"
                )

    def _meter(self) -> tuple[dict[str, int], int]:
        """Ticks of the compiled step by part and activated experts of a layer on average, so far."""
        step = self._generator.model.hybrimoe.step
        programs = getattr(step, "programs", [])
        if self.in_turn is not None or not programs:
            return {}, 0
        activated = list(programs[0].compiled.experts_activated.values())
        return step.meter()[0], sum(activated) // max(1, len(activated))

    def _count(self, n_replies: int, before: tuple[dict[str, int], int], n_steps: int) -> None:
        parts, experts = self._meter()
        counted = self._counted.setdefault(n_replies, _Counted())
        counted.steps += n_steps
        counted.experts += experts - before[1]
        for part, ticks in parts.items():
            counted.parts[part] = counted.parts.get(part, 0) + ticks - before[0][part]


def _n_tokens(replies: Sequence[Any]) -> int:
    return sum(len(reply.token_ids) for reply in replies)
