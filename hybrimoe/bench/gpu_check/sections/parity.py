"""Logits and greedy tokens of the accelerator against those of the CPU alone, for each dtype, policy and share."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import numpy.typing as npt

import hybrimoe
from hybrimoe.bench.gpu_check.findings import Findings
from hybrimoe.bench.gpu_check.sections import models
from hybrimoe.bench.gpu_check.setting import Setting
from hybrimoe.bench.model.contenders import LOGITS_COSINE
from hybrimoe.dense.place import dense_device, move
from hybrimoe.generation import TextGenerator

LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.999, "int8": 0.999, "int4": 0.999}
"""Of each step's logits, dense weights in float32 on both sides. The CPU lane rounds the activations of bfloat16
experts to bfloat16 and those of integer ones to int8, the accelerator's kernels do not: a relative error of 1e-2 an
expert, and now and then another expert of two that the router likes equally. A wrong expert or slot falls far below."""
BEST = 5
"""A greedy token that is not the CPU's is one of its so many best: a close choice."""


def run(setting: Setting, findings: Findings) -> None:
    """All pairs of dtype and policy at all shares, then a model whose weights lie on the accelerator before."""
    ids = models.prompt(setting)
    for dtype in setting.dtypes:
        with models.opened(setting, "none", dtype) as reference:
            tokens = models.greedy(reference, ids, setting.new_tokens + 1)[:-1]
            wanted = models.forced_logits(reference, ids, tokens)
        for policy in setting.policies:
            what = f"{dtype}, {policy}"
            if findings.time_for(what):
                with findings.part(what):
                    _policy(setting, findings, dtype, policy, (ids, tokens), wanted)
    what = "a model that lies on the device"
    if findings.time_for(what):
        with findings.part(what):
            _already_on_the_device(setting, findings, ids)


def _policy(
    setting: Setting, findings: Findings, dtype: str, policy: str, given: tuple[list[int], list[int]],
    wanted: npt.NDArray[np.float32],
) -> None:  # fmt: skip
    """One model at all shares; `given`: the prompt and the tokens after it, `wanted` the CPU's logits of these."""
    with models.opened(setting, setting.accelerator, dtype, policy=policy, share=setting.shares[0]) as generator:
        findings.row("decode steps", what=f"{dtype}, {policy}", way=models.step_way(generator))
        session = generator.model.hybrimoe.session
        for share in setting.shares:
            session.resize_slots(share)
            session.reset_stats()
            rows = models.forced_logits(generator, *given)
            _compare(findings, f"{dtype}, {policy}, {share:.0%} slots", dtype, rows, wanted, session.stats())


def _compare(
    findings: Findings, what: str, dtype: str, found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32],
    stats: Any,
) -> None:  # fmt: skip
    cosines = [models.cosine(*pair) for pair in zip(found, wanted, strict=True)]
    same = [int(row.argmax()) for row in found] == [int(row.argmax()) for row in wanted]
    equal = sum(int(a.argmax() == b.argmax()) for a, b in zip(found, wanted, strict=True))
    close = all(int(a.argmax()) in np.argsort(b)[-BEST:] for a, b in zip(found, wanted, strict=True))
    findings.row(
        "logits against the CPU's", what=what, prompt_cosine=round(cosines[0], 6),
        least_cosine_of_steps=round(min(cosines), 6), tokens_equal=f"{equal} of {len(found)}",
        hit_rate=stats.total.hit_rate and round(stats.total.hit_rate, 3), on_accelerator=stats.total.accel_experts,
        on_cpu=stats.total.cpu_experts, transfers=stats.total.transfers, prefetches=stats.total.prefetches,
    )  # fmt: skip
    findings.require(
        min(cosines) >= LEAST_COSINE[dtype],  # false for NaN, too
        f"{what}: least cosine {min(cosines):.6f}, expected {LEAST_COSINE[dtype]}",
    )
    findings.require(
        same if dtype == "float32" else close, f"{what}: {len(found) - equal} greedy tokens are not the CPU's"
    )
    findings.require(stats.total.accel_experts > 0, f"{what}: no expert ran on the accelerator")
    findings.require(stats.failures == 0, f"{what}: {stats.failures} calls failed and were repeated")


def _already_on_the_device(setting: Setting, findings: Findings, ids: list[int]) -> None:
    """`hybrimoe.inject` of a plain model that lies on the accelerator, and back."""
    made = models.source(setting)
    model = made.plain()
    model.set_experts_implementation("eager")
    device = dense_device(models.deployment(setting.accelerator, "bfloat16", "ours", 0.25))
    if device is not None:
        move(model, device)
    generator = TextGenerator(model, made.tokenizer)
    wanted = models.forced_logits(generator, ids, ids[:2])
    injection = hybrimoe.inject(model, accelerator=setting.accelerator, gpu_expert_slots=0.25, expert_dtype="bfloat16")
    try:
        found = models.forced_logits(generator, ids, ids[:2])
    finally:
        injection.restore()
    back = models.forced_logits(generator, ids, ids[:2])
    cosines = [min(models.cosine(*pair) for pair in zip(rows, wanted, strict=True)) for rows in (found, back)]
    findings.row(
        "hybrimoe.inject of a model that is on the device", injected_cosine=round(cosines[0], 6),
        restored_cosine=round(cosines[1], 6),
    )  # fmt: skip
    least = LOGITS_COSINE["bfloat16"]
    findings.require(min(cosines) >= least, f"injected where it lay: cosine {min(cosines):.4f}, expected {least}")
    del model, generator, injection
    gc.collect()
