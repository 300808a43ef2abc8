"""Runs one tiny family through the hybrid runtime in every placement and compares it with plain transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tiny_families import FAMILIES, prompt, tiny_model
from transformers import PreTrainedModel

import hybrimoe
from cpu_kernels import Activation
from hybrimoe.experts.layout import ExpertsLayout, find_experts, read
from hybrimoe.machine.profiles import open_hardware

NEW_TOKENS = 6
HARDWARE = "a6000-xeon5220r"  # costs from a profile, so that what runs where does not depend on this machine's load
BATCH = 2
ALL_SLOTS, SOME_SLOTS = 1.0, 0.3
PLACEMENTS: dict[str, dict[str, Any]] = {
    "cpu": {"accelerator": "none"},
    "accelerator": {
        "accelerator": "emulated",
        "gpu_expert_slots": ALL_SLOTS,
        "rules": [{"match": {"name": r"\.experts$"}, "replace": {"op": "accelerator_experts"}}],
    },
    "mixed": {"accelerator": "emulated", "gpu_expert_slots": SOME_SLOTS, "scheduler": {"policy": "hybrimoe"}},
}


@dataclass(frozen=True)
class Outputs:
    """What a model gives: logits of the whole prompt, logits of each generated token, and the tokens."""

    prefill: torch.Tensor
    decode: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """One placement against plain transformers."""

    prefill_error: float
    decode_error: float
    same_tokens: bool
    cpu_experts: int
    accel_experts: int
    restored: bool
    ways: dict[str, str]
    """How decode steps run: by layer, or of all of them as "model"."""


def outputs(model: PreTrainedModel) -> Outputs:
    """Prefill of a batch without cache, then greedy generation with a KV cache."""
    tokens = prompt(BATCH)
    with torch.no_grad():
        prefill = model(input_ids=tokens).logits
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "use_cache": True}
        generated = model.generate(tokens, output_logits=True, return_dict_in_generate=True, **options)
    return Outputs(prefill, torch.stack(generated.logits), generated.sequences)


def compare(model: PreTrainedModel, plain: Outputs, placement: str) -> Comparison:
    """Injects, runs, restores."""
    weights = {name: (id(value), value._version) for name, value in model.named_parameters()}
    options = PLACEMENTS[placement] | {"expert_dtype": "float32", "runtime": {"profile": open_hardware(HARDWARE)}}
    injection = hybrimoe.inject(model, **options)
    try:
        hybrid = outputs(model)
        total = injection.stats().as_dict()["total"]
        ways = dict(injection.explain().ways)
    finally:
        injection.restore()
    after = outputs(model)
    same = all(torch.equal(getattr(after, name), getattr(plain, name)) for name in ("prefill", "decode", "tokens"))
    untouched = {name: (id(value), value._version) for name, value in model.named_parameters()} == weights
    return Comparison(
        prefill_error=float((hybrid.prefill - plain.prefill).abs().max()),
        decode_error=float((hybrid.decode - plain.decode).abs().max()),
        same_tokens=torch.equal(hybrid.tokens, plain.tokens),
        cpu_experts=total["cpu_experts"],
        accel_experts=total["accel_experts"],
        restored=same and untouched,
        ways=ways,
    )


def plain_outputs(model: PreTrainedModel) -> Outputs:
    """Plain transformers, after a first run that lets its libraries choose their code paths."""
    outputs(model)
    return outputs(model)


def describe(family: str) -> dict[str, Any]:
    """What the family's table row says about its experts."""
    model = tiny_model(family)
    _, module = find_experts(model)[0]
    layout = read(module)
    return {
        "model_type": FAMILIES[family].model_type,
        "model_class": type(model).__name__,
        "experts_class": type(module).__name__,
        "gate": gate_text(layout.activation),
        "form": form_text(layout),
    }


def gate_text(activation: Activation) -> str:
    """The activation in a few words."""
    if activation.custom is not None:
        return "own code"
    slope = f" (slope {activation.alpha:g})" if activation.alpha != 1 else ""
    limits = [
        f"{name} {value:g}"
        for name, value in (
            ("gate <=", activation.gate_max),
            ("act <=", activation.act_max),
            ("|up| <=", activation.up_limit),
        )
        if value is not None
    ]
    limits += [f"up + {activation.up_offset:g}"] if activation.up_offset else []
    glu = " GLU" if activation.gated else ", no gate"
    return activation.kind + slope + glu + (f"; {', '.join(limits)}" if limits else "")


def form_text(layout: ExpertsLayout) -> str:
    """How the module stores its experts."""
    parts = [
        "transposed" if layout.is_transposed else "",
        "" if layout.is_concatenated else "interleaved",
        "biased" if layout.has_bias else "",
        "norm after each expert" if layout.post_expert_norm is not None else "",
        "some are the identity" if layout.num_identity else "",
    ]
    return ", ".join(part for part in parts if part) or "plain"
