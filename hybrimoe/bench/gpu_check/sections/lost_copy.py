"""A copy to the device that fails: the caller is told, and the next prompt is computed as before."""

from __future__ import annotations

from typing import Any

from hybrimoe.bench.gpu_check.findings import Findings
from hybrimoe.bench.gpu_check.sections import models
from hybrimoe.bench.gpu_check.setting import Setting

LEAST_COSINE = 0.9999
POLICY = "on_demand/none/lru"
MESSAGE = "this copy was made to fail"
NOT_NEEDED = "nothing: there was no such copy"
FAILING = (1, 2, 7)
"""Which copy of a prompt fails."""


def run(setting: Setting, findings: Findings) -> None:
    """One failing copy after the other, in one session."""
    ids = models.prompt(setting)
    with models.opened(setting, setting.accelerator, "int4", policy=POLICY, share=setting.shares[0]) as generator:
        wanted = models.forced_logits(generator, ids, ids[:2])
        session = generator.model.hybrimoe.session
        for number in FAILING:
            told = _with_failing_copy(generator, session.accelerators[0], ids, number)
            after = models.forced_logits(generator, ids, ids[:2])
            worst = min(models.cosine(*pair) for pair in zip(after, wanted, strict=True))
            findings.row(
                "failing copies", copy=number, told=told, cosine_of_next_prompt=round(worst, 6),
                failures_counted=session.stats().failures,
            )  # fmt: skip
            findings.require(
                MESSAGE in told or told == NOT_NEEDED, f"copy {number} failed, and the caller was told: {told}"
            )
            findings.require(
                worst >= LEAST_COSINE, f"after the failure of copy {number} logits have cosine {worst:.5f}"
            )


def _with_failing_copy(generator: Any, accelerator: Any, ids: list[int], number: int) -> str:
    """Computes a prompt while copy `number` fails; the error that reached the caller."""
    copy, seen = accelerator.copy_to_slot, []

    def failing(*arguments: Any, **more: Any) -> Any:
        seen.append(1)
        if len(seen) == number:
            raise RuntimeError(MESSAGE)
        return copy(*arguments, **more)

    accelerator.copy_to_slot = failing
    try:
        models.forced_logits(generator, ids, [])
    except Exception as error:  # noqa: BLE001  # which error it is, is what this asks
        return f"{type(error).__name__}: {error}"
    finally:
        del accelerator.copy_to_slot
    return NOT_NEEDED if len(seen) < number else "nothing"
