"""Decode steps and prompts in torch's profiler: do the lanes overlap, how often does the host wait and launch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from hybrimoe.bench.gpu_check.findings import Findings, SkippedError
from hybrimoe.bench.gpu_check.sections import models
from hybrimoe.bench.gpu_check.sections.profiled import CALLS, Seen, begun_while, both_us, busy_us, profile
from hybrimoe.bench.gpu_check.setting import Setting
from hybrimoe.generation import PrefixCache, TextGenerator

SHARE, DTYPE = 0.25, "int4"
PYTHON = "Python between the pieces"
"""Of a captured step: what one compiled call does else, where it can."""
SHOWN_KERNELS = 12
SHOWN_CALLS = 12
PROMPTS = 3
RECORD_COPY_US = 10.0
"""A copy to the device that takes longer brings an expert; shorter ones bring indices and rows."""

Watch = Callable[[Callable[[], object]], Seen]


def run(setting: Setting, findings: Findings, watch: Watch = profile) -> None:
    """Decode steps at a quarter of the slots and with all, by each policy; prompts by the first. `watch` runs work and
    says what it saw."""
    if setting.emulated:
        raise SkippedError("the emulated device makes no calls of a driver")
    first = setting.policies[0]
    cases = [(policy, SHARE, "auto") for policy in setting.policies]
    for policy, share, way in [(first, SHARE, "transformers"), (first, SHARE, PYTHON), *cases, (first, 1.0, "auto")]:
        what = f"{policy}, {share:.0%} slots" + ("" if way == "auto" else f", {way}")
        if not findings.time_for(what):
            return
        with (
            findings.part(what),
            models.python_between_pieces(way == PYTHON),
            models.opened(
                setting, setting.accelerator, DTYPE, policy=policy, share=share, dense_dtype="auto",
                step="auto" if way == PYTHON else way,
            ) as generator,
        ):  # fmt: skip
            _steps(setting, findings, what, generator, watch)
            if way == "auto" and policy == first:
                _prompt(setting, findings, what, generator, watch)


def _steps(setting: Setting, findings: Findings, what: str, generator: TextGenerator, watch: Watch) -> None:
    """Some steps by the clock, then as many in the profiler."""
    step = _decoding(generator, models.prompt(setting))
    for _ in range(setting.new_tokens):
        step()
    session = generator.model.hybrimoe.session
    session.reset_stats()
    started = time.perf_counter()
    for _ in range(setting.new_tokens):
        step()
    plain_us = (time.perf_counter() - started) * 1e6 / setting.new_tokens
    stats, looped = session.stats().total, models.n_looped(generator)
    findings.row("decode steps", what=what, way=models.step_way(generator), steps_by_one_compiled_call=looped)
    seen = watch(lambda: [step() for _ in range(setting.new_tokens)])
    tokens, layers = setting.new_tokens, setting.layers
    findings.row(
        "lanes per layer of a token", what=what, us_a_layer_unprofiled=round(plain_us / layers, 1),
        hit_rate=stats.hit_rate and round(stats.hit_rate, 3), cpu_experts=round(stats.cpu_experts / tokens / layers, 2),
        accel_experts=round(stats.accel_experts / tokens / layers, 2),
        transfers=round((stats.transfers + stats.prefetches) / tokens / layers, 2),
        planning_us=round(stats.overhead_us / tokens / layers, 1), cpu_lane_us=round(stats.cpu_us / tokens / layers, 1),
    )  # fmt: skip
    for kind in CALLS:
        n_calls = seen.called(kind)
        findings.row(
            "calls of the runtime", what=what, kind=kind, a_token=round(n_calls / tokens, 2),
            a_layer=round(n_calls / tokens / layers, 2), host_us_a_token=round(seen.spent_us(kind) / tokens, 1),
        )  # fmt: skip
    for name, count in seen.calls.most_common(SHOWN_CALLS):
        findings.row(
            "calls by name", what=what, name=name, a_token=round(count / tokens, 2),
            host_us_each=round(seen.host_us[name] / count, 2),
        )  # fmt: skip
    _overlaps(findings, what, seen, tokens)
    for name, us in seen.kernel_us.most_common(SHOWN_KERNELS):
        findings.row(
            "kernels", what=what, kernel=name[:80], us_a_token=round(us / tokens, 1),
            launches_a_token=round(seen.kernel_calls[name] / tokens, 2), us_each=round(us / seen.kernel_calls[name], 2),
        )  # fmt: skip


def _prompt(setting: Setting, findings: Findings, what: str, generator: TextGenerator, watch: Watch) -> None:
    """A prompt by the clock, the median of some, then one in the profiler."""
    ids = models.prompt(setting, setting.long_prompt_tokens)

    def compute() -> None:
        generator.forward(ids, PrefixCache(generator.model)).argmax().item()

    compute()
    before = _streamed(generator)
    plain_us = median(_us(compute) for _ in range(PROMPTS))
    seen = watch(compute)
    layers, table = setting.layers, f"a prompt of {len(ids)} tokens, per layer"
    findings.row(
        table, what=what, us_unprofiled=round(plain_us / layers, 1),
        kernels_busy_us=_each(busy_us(seen.kernels), layers),
        streamed=f"{_streamed(generator) - before} of {(PROMPTS + 1) * layers} layers",
        **{kind.replace(" ", "_"): _each(seen.called(kind), layers) for kind in CALLS},
        host_us_of_waits=_each(seen.spent_us("waits of the host"), layers),
        host_us_of_launches=_each(seen.spent_us("launches"), layers),
        mib_up=_each(seen.copied_bytes["HtoD"] / 2**20, layers),
        mib_down=_each(seen.copied_bytes["DtoH"] / 2**20, layers),
    )  # fmt: skip
    for name, us in seen.kernel_us.most_common(SHOWN_KERNELS):
        findings.row(
            f"kernels of a prompt of {len(ids)} tokens", what=what, kernel=name[:80], us_a_layer=_each(us, layers),
            launches_a_layer=_each(seen.kernel_calls[name], layers), us_each=_each(us, seen.kernel_calls[name]),
        )  # fmt: skip


def _streamed(generator: TextGenerator) -> int:
    """Layers of prompts whose experts have crossed the link without a plan."""
    staged = generator.model.hybrimoe.session.staged()
    return 0 if staged is None else int(staged.n_calls)


def _us(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e6


def _each(amount: float, of: int) -> float:
    return round(amount / of, 2)


def _decoding(generator: Any, ids: Sequence[int]) -> Callable[[], None]:
    """Computes a prompt; what it returns computes one greedy token more at each call."""
    cache = PrefixCache(generator.model)
    token = int(generator.forward(ids, cache).argmax())

    def step() -> None:
        nonlocal token
        token = int(generator.forward([token], cache).argmax())

    return step


def _overlaps(findings: Findings, what: str, seen: Seen, tokens: int) -> None:
    """Only where the profiler saw the device."""
    if not seen.kernels:
        findings.remark(f"{what}: no kernel of the device is in the profile, so nothing is said of overlap")
        return
    up, down = (seen.copies.get(kind, []) for kind in ("HtoD", "DtoH"))
    records = [span for span in up if _brings_expert(span)]
    copy_us, lane_us = busy_us(records), busy_us(seen.cpu_lane)
    findings.row(
        "overlap", what=what, kernels_busy_us=round(busy_us(seen.kernels) / tokens, 1),
        copies_up=round(len(up) / tokens, 2), copies_up_us=round(busy_us(up) / tokens, 1),
        copies_down=round(len(down) / tokens, 2), copies_down_us=round(busy_us(down) / tokens, 1),
        cpu_lane_us=round(lane_us / tokens, 1),
        record_copies=round(len(records) / tokens, 2),
        record_copies_under_kernels=_share(both_us(records, seen.kernels), copy_us),
        record_copies_under_cpu_lane=_share(both_us(records, seen.cpu_lane), copy_us),
        cpu_lane_under_kernels=_share(both_us(seen.cpu_lane, seen.kernels), lane_us),
        cpu_lane_begun_while_link_busy=f"{begun_while(seen.cpu_lane, records)} of {len(seen.cpu_lane)}",
        kernel_streams=len(seen.streams.get("kernels", ())), copy_streams=len(seen.streams.get("HtoD", ())),
    )  # fmt: skip


def _brings_expert(span: tuple[float, float]) -> bool:
    """Whether a copy brings an expert."""
    return span[1] - span[0] >= RECORD_COPY_US


def _share(part: float, whole: float) -> str | None:
    return f"{part / whole:.0%}" if whole else None
