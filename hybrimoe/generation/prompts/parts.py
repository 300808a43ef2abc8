"""How much of a prompt is computed between two tokens of the other replies, so that none of them waits long.

The size is measured once and then kept, also from one start to the next: a prompt is always cut alike, so its results
do not depend on who else is served.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from hybrimoe.generation.context import model_context_tokens
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.kv_memory import MOST_TOKENS, chunk_tokens, keeps_every_token
from hybrimoe.generation.vocabulary import vocabulary_size
from hybrimoe.kv_sizes import number_of

__all__ = [
    "PromptPart", "PromptTimes", "TimesFile", "attention_share", "chosen_part", "measured_part", "measured_times",
    "tokens_behind",
]  # fmt: skip

FEW_TOKENS, MANY_TOKENS = 16, 128
"""Of the prompts that are timed. 16 tokens already choose most experts of a layer, so that what further ones take is
their own. Prompts of up to 64 may be one compiled step, where a token takes less than in a part."""
LEAST_TOKENS = 16
"""Of a part: fewer would read the weights for next to nothing."""
TRIAL_SEED = 0
ROUNDS, TRIAL_US = 3, 1.5e6
"""How often each of the prompts is timed, as long as all together take no longer than this: a program that runs beside
for a moment would count for a week, and how far the times are apart says what a part may take."""
LEAST_SPREAD = 1.1
"""Longest time of a part over the usual one: beside a prompt of 65,000 tokens, alone on a machine, the longest wait was
1.08 times what a part was to take (docs/server.md), and a stream waits for its own step, too."""
KEPT_DAYS = 7
"""Times that are older are measured anew: the machine may have been busy then."""
ATTENTION_FACTOR = 1.3
"""Time of a multiplication within attention over one in a layer's matrices: of OLMoE's layer with int4 experts, prompts
of 4,096 and 16,384 tokens on a Xeon (docs/long-chats.md): 1.26."""


class Computes(Protocol):
    """What a `TextGenerator` is here."""

    model: Any

    def forward(self, token_ids: Sequence[int], cache: PrefixCache) -> Any:
        """Compute tokens on top of a cache."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """The size of a part at a prompt's beginning and what it takes by what was measured.

    slower: what each token before a part adds to the part's time, as a share of that.
    """

    n_tokens: int
    expected_us: float
    slower: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptTimes:
    """What a part of a prompt takes on this machine: fixed_us + n * per_token_us, and up to `spread` times as long."""

    fixed_us: float
    per_token_us: float
    spread: float = LEAST_SPREAD


class TimesFile:
    """Where the times of one model on one machine are kept for the next start, which then need not measure them.

    path: its name tells all that the times depend on, the load of the machine apart. That is why they are measured anew
    after `KEPT_DAYS`.
    """

    def __init__(self, path: Path, now_s: Callable[[], float] = time.time) -> None:
        self.path, self._now_s = path, now_s

    def read(self) -> PromptTimes | None:
        """What was measured; None where there is nothing, nothing that makes sense, or too old."""
        try:
            found = json.loads(self.path.read_bytes())
            times = PromptTimes(float(found["fixed_us"]), float(found["per_token_us"]), float(found["spread"]))
            age_s = self._now_s() - float(found["measured_s"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
        sound = 0.0 <= times.fixed_us < math.inf and 0.0 < times.per_token_us < math.inf
        sound = sound and 1.0 <= times.spread < math.inf
        return times if sound and 0.0 <= age_s <= KEPT_DAYS * 86_400 else None

    def _remove_old(self) -> None:
        """Files that no start would read any more, of whatever model."""
        for file in self.path.parent.glob(f"{self.path.name.rpartition('-')[0]}-*"):
            if self._now_s() - file.stat().st_mtime > KEPT_DAYS * 86_400:
                file.unlink()

    def write(self, times: PromptTimes) -> None:
        """Keeps them, without a word where nothing can be written: the next start measures, as this one did."""
        told = {
            "fixed_us": times.fixed_us, "per_token_us": times.per_token_us, "spread": times.spread,
            "measured_s": self._now_s(),
        }  # fmt: skip
        own = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(told), encoding="utf-8")
            own.replace(self.path)
            self._remove_old()


def measured_part(
    generator: Computes, stall_us: float, clock_ns: Callable[[], int] = time.perf_counter_ns,
    kept: TimesFile | None = None,
) -> PromptPart:  # fmt: skip
    """The part of a prompt that takes at most `stall_us` on this machine; see `chosen_part`. kept: times of an earlier
    start are taken from there, and those measured now go there."""
    from hybrimoe.runtime.tier.store import TieredStore  # torch comes with it, which a server imports later

    if isinstance(getattr(_session(generator), "store", None), TieredStore):
        kept = None  # what is read from disk depends on the memory that is free at this start
    times = None if kept is None else kept.read()
    if times is None:
        times = measured_times(generator, clock_ns)
        if kept is not None:
            kept.write(times)
    part = chosen_part(times.fixed_us, times.per_token_us, stall_us / times.spread)
    n_tokens = min(part.n_tokens, MOST_TOKENS, chunk_tokens(generator.model))
    return PromptPart(n_tokens, part.expected_us * n_tokens / part.n_tokens, attention_share(generator.model))


def measured_times(generator: Computes, clock_ns: Callable[[], int] = time.perf_counter_ns) -> PromptTimes:
    """Computes short prompts, which count in no statistics; the first is not timed, because a model's first call does
    more than others. Medians of up to `ROUNDS` of each length, and how far the longest of the longer ones is from them.
    """
    longest = min(MANY_TOKENS, model_context_tokens(generator.model.config) or MANY_TOKENS)
    few = max(1, longest // (MANY_TOKENS // FEW_TOKENS))
    numbers = random.Random(TRIAL_SEED)
    ids = [numbers.randrange(vocabulary_size(generator.model)) for _ in range(longest)]

    def took_us(n_tokens: int) -> float:
        cache = PrefixCache(generator.model)
        cache.reuse(ids[:n_tokens])
        began = clock_ns()
        generator.forward(ids[:n_tokens], cache)
        return (clock_ns() - began) / 1000

    took_us(few)
    of_few: list[float] = []
    of_many: list[float] = []
    while len(of_many) < ROUNDS and (not of_many or sum(of_few) + sum(of_many) < TRIAL_US):
        of_few.append(took_us(few))
        of_many.append(took_us(longest))
    session = _session(generator)
    if session is not None:
        session.forget_trial()
    few_us, many_us = median(of_few), median(of_many)
    per_token_us = max((many_us - few_us) / max(1, longest - few), many_us / longest / 100)
    spread = max(LEAST_SPREAD, max(of_many) / many_us)
    return PromptTimes(max(0.0, few_us - few * per_token_us), per_token_us, spread)


def _session(generator: Computes) -> Any:
    return getattr(getattr(generator.model, "hybrimoe", None), "session", None)


def tokens_behind(n_before: int, n_tokens: int, slower: float) -> int:
    """The size of a part behind `n_before` tokens, where one at the beginning has `n_tokens`; see `PromptPart`."""
    return min(n_tokens, max(LEAST_TOKENS, int(n_tokens / (1 + slower * n_before))))


def attention_share(model: Any) -> float:
    """What attention to one earlier token takes of a token's time, as a share of all else: multiplications, counted by
    the model's shape, times `ATTENTION_FACTOR`. Layers with windows or states of their own do not count."""
    from hybrimoe.generation.growing import growing_cache

    config = model.config.get_text_config(decoder=True)
    width, heads = number_of(config, "hidden_size"), number_of(config, "num_attention_heads")
    head = number_of(config, "head_dim") or width // max(1, heads)
    kv_heads = number_of(config, "num_key_value_heads") or heads
    inner = number_of(config, "moe_intermediate_size") or number_of(config, "intermediate_size")
    shared = number_of(config, "shared_expert_intermediate_size")
    layers = growing_cache(config).layers
    n_full = sum(map(keeps_every_token, layers))
    of_layer = 2 * width * head * (heads + kv_heads)
    of_layer += 3 * width * (max(1, number_of(config, "num_experts_per_tok")) * inner + shared)
    return ATTENTION_FACTOR * 2 * heads * head * n_full / max(1, of_layer * len(layers))


def chosen_part(fixed_us: float, per_token_us: float, stall_us: float) -> PromptPart:
    """The most tokens that take `stall_us`, where a part takes fixed_us + n * per_token_us.

    Not fewer than take as long as the fixed share (weights that are read or moved for any number of tokens): smaller
    parts would spend most of their time on it, and a prompt would take several times as long as whole. Where that is
    more than `stall_us` allows, `expected_us` says what the others wait.
    """
    fits, worthwhile = (stall_us - fixed_us) / per_token_us, fixed_us / per_token_us
    n_tokens = max(LEAST_TOKENS, int(fits), int(worthwhile))
    return PromptPart(n_tokens, fixed_us + n_tokens * per_token_us)
