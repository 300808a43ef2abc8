"""The measurement behind `hybrimoe bench attention`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from cpu_kernels import decode_attention, supports_decode_attention
from hybrimoe.bench.rounds import alternate, spread
from hybrimoe.errors import ConfigError, ModelError

SEED = 0
TOLERANCE = 0.02
"""Largest deviation from float64, relative to the largest result: bfloat16 keeps 8 bits."""


@dataclass(frozen=True, slots=True)
class Case:
    """One layer's attention: cached tokens, query heads, heads of keys and values, columns of a head."""

    context: int
    heads: int
    kv_heads: int
    head_size: int


def measure(case: Case, rounds: int, threads: int | None) -> dict[str, Any]:
    """Times in us with their spread, and GB/s of keys and values. Raises ModelError where a result is wrong.

    Raises ConfigError for heads that the kernel does not take.
    """
    generator = torch.Generator().manual_seed(SEED)
    query, keys, values = (
        torch.randn(1, heads, tokens, case.head_size, generator=generator).bfloat16()
        for heads, tokens in ((case.heads, 1), (case.kv_heads, case.context), (case.kv_heads, case.context))
    )
    if not supports_decode_attention(query, keys, values):
        raise ConfigError(
            f"expected heads in groups that share keys ({case.heads} are no multiple of {case.kv_heads}) of a size in"
            f" whole vectors of this CPU, found {case.head_size}; this attention stays with torch"
        )
    scale = case.head_size**-0.5
    contenders: dict[str, Callable[[], torch.Tensor]] = {
        "ours": partial(decode_attention, query, keys, values, scale, None, threads),
        "torch": partial(functional.scaled_dot_product_attention, query, keys, values, scale=scale, enable_gqa=True),
    }
    _check(contenders, query, keys, values, scale)
    times = alternate(contenders, _microseconds, rounds)
    ours = spread(times["ours"])
    n_bytes = 2 * (keys.numel() + values.numel())
    return {
        "context": case.context, "heads": case.heads, "kv_heads": case.kv_heads, "head_size": case.head_size,
        "ours_us": ours, "torch_us": spread(times["torch"]), "gb_per_s": n_bytes / ours["median"] / 1e3,
    }  # fmt: skip


def _microseconds(run: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1000


def _check(
    contenders: dict[str, Callable[[], torch.Tensor]], query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    scale: float,
) -> None:  # fmt: skip
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    expected = torch.softmax(query.double() @ keys.transpose(2, 3) * scale, -1) @ values
    for name, run in contenders.items():
        error = float((run().double() - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise ModelError(f"{name} deviates from float64 by {error:.3f}; a wrong result is not timed")
