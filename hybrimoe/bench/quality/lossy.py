"""What lossy policies cost and bring: perplexity, greedy agreement and divergence beside speed, hits and transfers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from hybrimoe.bench.quality.text import compare, text_windows, window_logits
from hybrimoe.config.deploy import DeployConfig
from hybrimoe.config.scheduler import lossy_option
from hybrimoe.machine.facts import machine
from hybrimoe.runtime.layer_call.stats import ran_emulated

PROMPT_TOKENS = 32
"""Of each window: computed as a prompt, before decoding follows the text."""
LOSSLESS = "lossless"


@dataclass(frozen=True)
class Request:
    """deployment: the model and where it runs; text None = the held-out text beside it. lossy: as `--lossy` takes them.

    windows: texts read as prompts; decode_tokens: steps after a prompt in each of `decode_windows` of them.
    """

    deployment: DeployConfig
    text: Path | None
    lossy: tuple[str, ...]
    windows: int
    decode_windows: int
    decode_tokens: int


@dataclass(slots=True)
class Variant:
    """One policy: its model and what was seen of it."""

    name: str
    model: Any
    generator: Any
    prefill: list[torch.Tensor] = field(default_factory=list)
    decode: list[torch.Tensor] = field(default_factory=list)
    step_us: list[float] = field(default_factory=list)
    counters: dict[str, Any] = field(default_factory=dict)


def run(request: Request, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """One row a policy, the lossless one first. Decoding alternates between the policies, text by text."""
    options = [None if text == "none" else lossy_option(text) for text in ("none", *request.lossy)]
    with ExitStack() as stack:
        variants = []
        for name, lossy in zip((LOSSLESS, *request.lossy), options, strict=True):
            progress(f"loading {name}")
            variants.append(_open(request, name, lossy, stack))
        folder = Path(variants[0].model.config._name_or_path)
        windows, source = text_windows(folder, request.text, request.windows)
        for variant in variants:
            progress(f"{variant.name}: {sum(map(len, windows))} tokens as prompts")
            variant.prefill = window_logits(variant.model, windows)
            variant.model.hybrimoe.session.reset_stats()
        steps = [_steps(window, request.decode_tokens) for window in _spread(windows, request.decode_windows)]
        for number, (prompt, following) in enumerate(steps):
            progress(f"decoding text {number + 1} of {len(steps)}")
            for at in range(len(variants)):
                _decode(variants[(at + number) % len(variants)], prompt, following)
        rows = [_row(variant, variants[0], windows, [following for _, following in steps]) for variant in variants]
    dtype = variants[0].model.hybrimoe.session.config.expert_dtype
    return {
        "text": source, "prefill_tokens": sum(map(len, windows)), "dtype": dtype,
        "decode_tokens": sum(len(following) for _, following in steps), "machine": machine(), "rows": rows,
    }  # fmt: skip


def _open(request: Request, name: str, lossy: dict[str, Any] | None, stack: ExitStack) -> Variant:
    from hybrimoe.checkpoint import load, load_tokenizer
    from hybrimoe.generation import TextGenerator

    model = load(config=request.deployment, lossy=lossy or "none", packed_file=False, progress=False)
    stack.callback(model.hybrimoe.session.close)
    return Variant(name, model, TextGenerator(model, load_tokenizer(request.deployment.model)))


def _spread(windows: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    some = min(count, len(windows))
    return [windows[index * len(windows) // some] for index in range(some)]


def _steps(window: torch.Tensor, n_tokens: int) -> tuple[list[int], torch.Tensor]:
    """A prompt, and the tokens that follow it in the text."""
    cut = min(PROMPT_TOKENS, len(window) // 2)
    return window[:cut].tolist(), window[cut : cut + n_tokens]


def _decode(variant: Variant, prompt: list[int], following: torch.Tensor) -> None:
    """Teacher-forced decoding: the logits [steps, V] that each next token of the text is predicted from."""
    from hybrimoe.generation import PrefixCache

    cache = PrefixCache(variant.model)
    cache.clear()
    found = [variant.generator.forward(prompt, cache).float()]
    for token in following[:-1].tolist():
        started = time.perf_counter_ns()
        found.append(variant.generator.forward([token], cache).float())
        variant.step_us.append((time.perf_counter_ns() - started) * 1e-3)
    variant.decode.append(torch.stack(found))


def _row(variant: Variant, base: Variant, windows: list[torch.Tensor], following: list[torch.Tensor]) -> dict[str, Any]:
    stats = variant.model.hybrimoe.session.stats().as_dict()
    decode = stats["decode"]
    steps = len(variant.step_us)
    read = compare(variant.prefill, base.prefill, [ids[1:] for ids in windows], _divergence)
    written = compare(variant.decode, base.decode, following, _divergence)
    routed = decode["routed"] or 1
    return {
        "policy": variant.name,
        "perplexity": read[0],
        "greedy_agreement": read[1],
        "divergence": read[2],
        "decode_perplexity": written[0],
        "decode_greedy_agreement": written[1],
        "decode_divergence": written[2],
        "tokens_per_s": 1e6 / median(variant.step_us),
        "provenance": "emulated" if ran_emulated(stats) else "measured",
        "hit_rate": decode["hit_rate"],
        "transfers_per_token": (decode["transfers"] + decode["prefetches"]) / steps,
        "transfer_kib_per_token": decode["transfer_bytes"] / 1024 / steps,
        "skipped": decode["skipped"] / routed,
        "substituted": decode["substituted"] / routed,
        "lowered": decode["lowered"] / routed,
        "deferred": decode["deferred"] / routed,
        "host_mib": stats["store_bytes"] / 2**20,
    }


def _divergence(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the policy's next-token distribution from the lossless one, nats, [tokens]."""
    log_mine, log_theirs = functional.log_softmax(mine, dim=1), functional.log_softmax(theirs, dim=1)
    return (log_theirs.exp() * (log_theirs - log_mine)).sum(dim=1)
