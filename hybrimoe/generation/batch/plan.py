"""How many prompts at once: MoE-Lightning's plan for an open session and a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING

from hybrimoe.errors import ConfigError
from hybrimoe.generation.batch.generate import BatchPrompt, new_tokens
from hybrimoe.generation.sampling import SamplingOptions
from hybrimoe.machine.calibrate import quick_profile
from hybrimoe.machine.profiles import hardware_for_plan
from scheduler.batching import LightningPlan, MemoryLeft, Roofline, Workload, plan_lightning
from scheduler.batching.lightning import Attention
from scheduler.machine.profile import ModelShape

if TYPE_CHECKING:
    from hybrimoe.generation.engine import TextGenerator
    from hybrimoe.runtime import Session

__all__ = ["JobPlan", "plan_job"]

MEMORY_SHARE = 0.5
"""Share of the free memory that keys, values and activations of a batch may take."""


@dataclass(frozen=True, slots=True)
class JobPlan:
    """The plan, and a sentence that says with which hardware profile it was made."""

    plan: LightningPlan
    hardware: str


def plan_job(
    generator: TextGenerator, session: Session | None, shape: ModelShape, prompts: Sequence[BatchPrompt],
    options: SamplingOptions, max_batch: int | None,
) -> JobPlan:  # fmt: skip
    """The batch that MoE-Lightning's model of this machine finds best. `shape`: of the model.

    Attention and its keys and values are where the dense weights are: on a real accelerator, else in host memory.
    Raises ConfigError for a session without slots (there is no link to overlap with).
    """
    from hybrimoe.machine.memory import available_bytes

    if session is None or not session.n_slots:
        raise ConfigError(
            "moe-lightning overlaps link, CPU and accelerator, and this session has no accelerator slots;"
            " use --batching none or expertflow, or --accelerator emulated"
        )
    layers, accelerator = session.layers, session.accelerators[0]
    spec = layers[0].spec
    profile, hardware = hardware_for_plan(None, lambda: quick_profile(spec.hidden, spec.inter, spec.dtype))
    host_bytes = round(MEMORY_SHARE * available_bytes())
    free_bytes = accelerator.free_bytes()
    on_device = accelerator.kind != "emulated"
    places: tuple[Attention, ...] = ("accelerator",) if on_device else ("cpu",)
    accel_bytes = host_bytes if free_bytes is None else round(MEMORY_SHARE * free_bytes)
    roofline = Roofline(
        profile, replace(shape, n_layers=len(layers)), expert_dtype=spec.dtype,
        dense_dtype=_dense_dtype(generator), cached_share=session.n_slots / sum(layer.num_experts for layer in layers),
    )  # fmt: skip
    workload = Workload(
        len(prompts), round(mean(len(prompt.token_ids) for prompt in prompts)),
        max(1, round(mean(new_tokens(generator, prompt, options) for prompt in prompts))),
    )  # fmt: skip
    return JobPlan(plan_lightning(roofline, workload, MemoryLeft(accel_bytes, host_bytes), max_batch, places), hardware)


def _dense_dtype(generator: TextGenerator) -> str:
    """float32 or bfloat16, as the model computes outside its experts (float16 costs what bfloat16 does)."""
    name = str(generator.model.dtype).removeprefix("torch.")
    return "float32" if name == "float32" else "bfloat16"
