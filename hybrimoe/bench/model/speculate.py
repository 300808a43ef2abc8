"""What speculation brings: the time of a step by its tokens, and replies with and without drafts on the same model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hybrimoe.bench import rounds as harness
from hybrimoe.bench.model.sources import CheckpointSource, RandomSource
from hybrimoe.errors import ModelError
from hybrimoe.machine.facts import machine

if TYPE_CHECKING:
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation import SamplingOptions, TextGenerator

Progress = Callable[[int, int, str], None]

PASSAGE = (
    "The old house stood at the end of the lane, where the road bends down to the river. Every evening the miller's "
    "daughter walked past its gate, and every evening the same grey cat sat on the wall and watched her go by. Nobody "
    "knew who had lived there, and nobody asked; but in the village it was said that a light burned in the upper "
    "window on the night before a storm, and that the clock in the hall had never stopped."
)
"""A text of our own, to be repeated."""
BEGINNING = "The old house stood at the end of the lane, where"
FREE = "It was a bright morning, and the two sisters had set out early, because"
CONTEXT_TOKENS = 64
"""Tokens before the steps that are timed, and of a passage of random tokens."""
STEPS_A_ROUND = 16
TEMPERATURE, SEED = 0.8, 1
"""Free text is drawn: chosen greedily, a small model soon repeats itself."""


@dataclass(frozen=True, slots=True)
class Request:
    """One command line of `bench speculate`. model: None is the demo; or a shape with so many layers."""

    model: str | None
    shape: str | None
    layers: int | None
    deployment: DeployConfig
    new_tokens: int
    rounds: int


def measure(request: Request, progress: Progress) -> dict[str, Any]:
    """Steps by rows, and replies on a text to repeat and on free text, as plain data.

    Raises ConfigError for a model that cannot speculate, ModelError where drafts changed a token.
    """
    from hybrimoe.generation import SamplingOptions, TextGenerator

    source = CheckpointSource(request.model) if request.shape is None else RandomSource(request.shape, request.layers)
    model = source.hybrid(request.deployment, progress)
    try:
        plain, drafting = (TextGenerator(model, source.tokenizer, speculate=way) for way in (False, True))
        prompts = _prompts(request, source.vocab_size)
        greedy = SamplingOptions(temperature=0.0, max_new_tokens=request.new_tokens, ignore_eos=True)
        options = {"copying": greedy, "free": replace(greedy, temperature=TEMPERATURE, seed=SEED)}
        rows = step_times(plain, prompts["copying"], request.rounds)
        ways = {"without": plain, "with drafts": drafting}
        replies = [_text(name, ids, ways, options[name], request.rounds, progress) for name, ids in prompts.items()]
    finally:
        model.hybrimoe.session.close()
    return {
        "bench": "speculate",
        "model": request.shape or request.model or "demo",
        "weights": "random" if request.shape else "checkpoint",
        "expert_dtype": model.hybrimoe.session.config.expert_dtype,
        "dense_dtype": request.deployment.cpu.dense_dtype,
        "new_tokens": request.new_tokens,
        "rounds": request.rounds,
        "machine": machine(),
        "steps": rows,
        "texts": replies,
    }


def _prompts(request: Request, vocab_size: int) -> dict[str, list[int]]:
    """A passage twice and its beginning, and a text that is new; of a random model, the same of random tokens."""
    import numpy as np

    if request.shape is None:
        from hybrimoe.checkpoint import load_tokenizer

        tokenizer = load_tokenizer(request.model)
        texts = {"copying": f"{PASSAGE}\n\n{PASSAGE}\n\n{BEGINNING}", "free": FREE}
        return {name: list(tokenizer(text)["input_ids"]) for name, text in texts.items()}
    drawn = [int(token) for token in np.random.default_rng(0).integers(3, vocab_size, 2 * CONTEXT_TOKENS)]
    passage = drawn[:CONTEXT_TOKENS]
    return {"copying": [*passage, *passage, *passage[:8]], "free": drawn[CONTEXT_TOKENS:]}


def step_times(generator: TextGenerator, token_ids: Sequence[int], n_rounds: int) -> list[dict[str, Any]]:
    """Steps of 1 to 4 tokens of a text, in alternating rounds: us, and the acceptance from which drafting so many pays.

    Without a compiled step ConfigError, as `require_speculation`.
    """
    from hybrimoe.generation import PrefixCache, SamplingOptions
    from hybrimoe.generation.pace import MAX_DRAFT_TOKENS
    from hybrimoe.generation.speculation import require_speculation

    require_speculation(generator.model)
    cache = PrefixCache(generator.model)
    one = SamplingOptions(temperature=0.0, max_new_tokens=1)
    "".join(generator.reply(token_ids[:CONTEXT_TOKENS], one, cache=cache))
    rows = {str(n): n for n in range(1, MAX_DRAFT_TOKENS + 2)}
    timed = harness.alternate(rows, partial(_step_us, generator, cache, token_ids), n_rounds)
    us = {n: harness.spread(timed[name]) for name, n in rows.items()}
    return [{"tokens": n, "us": us[n], "pays_from": _break_even(n - 1, us[n]["median"] / us[1]["median"])} for n in us]


def _step_us(generator: TextGenerator, cache: Any, token_ids: Sequence[int], n_rows: int) -> float:
    """Mean time of a step of so many tokens of the text, each behind the same context."""
    total = 0.0
    for number in range(STEPS_A_ROUND):
        first = CONTEXT_TOKENS + number * n_rows % (len(token_ids) - CONTEXT_TOKENS - n_rows)
        began = time.perf_counter()
        rows = generator.verify(token_ids[first : first + n_rows], cache)
        total += time.perf_counter() - began
        assert rows is not None
        cache.drop_last(n_rows)
    return total / STEPS_A_ROUND * 1e6


def _break_even(n_drafted: int, relative_time: float) -> float | None:
    """The share of right drafted tokens from which 1 + a + ... + a^n tokens pay for the time; None where it never does.

    relative_time: of the step, to that of one token.
    """
    if n_drafted == 0 or relative_time > n_drafted + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        if sum(share**i for i in range(n_drafted + 1)) < relative_time:
            low = share
        else:
            high = share
    return high


def _text(
    name: str, token_ids: Sequence[int], ways: dict[str, TextGenerator], options: SamplingOptions, n_rounds: int,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Tokens a second of a reply with and without drafts, and what the drafts of the last round did."""
    said: dict[str, list[int]] = {}
    stats: dict[str, Any] = {}

    def tokens_per_s(way: str) -> float:
        reply = ways[way].reply(token_ids, options)
        "".join(reply)
        if said.setdefault("tokens", reply.token_ids) != reply.token_ids:
            raise ModelError(f"{name}: the reply {way} is another one; drafts must not change a token")
        if reply.speculation is not None:
            stats.update(reply.speculation.as_dict())
        return len(reply.times.between_tokens_us) / reply.times.decode_us * 1e6

    values = harness.alternate({way: way for way in ways}, tokens_per_s, n_rounds, progress=progress)
    speeds = {way: harness.spread(found) for way, found in values.items()}
    gain = speeds["with drafts"]["median"] / speeds["without"]["median"]
    return {"text": name, "tokens_per_s": speeds, "gain": gain, "drafts": stats}
