"""What the sections run on: the device, the random model, and how much of everything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

QUICK_BELOW_MINUTES = 6.0
"""A shorter budget takes the quick sizes."""
EMULATED = "emulated"

SMALL_MODEL: Mapping[str, int] = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
    "eos_token_id": 2,
}
"""Entries of a model's configuration that are replaced where no card is checked: the kit itself is."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One run of the kit.

    accelerator: a torch device, or "emulated". kind: what its figures are, e.g. "measured on NVIDIA H200".
    shape: a shipped model shape, random weights. layers: how many of its layers; speed_layers: for tokens a second.
    smaller: entries of the shape's configuration that are replaced. kernel_shapes: how many shapes of
    `hybrimoe.bench.kernels.card` the kernels are timed with. shares, speed_shares: of the experts that have a slot.
    limit_s: time of the section that runs now.
    """

    accelerator: str
    kind: str
    shape: str = "olmoe-1b-7b"
    layers: int = 2
    speed_layers: int = 8
    smaller: Mapping[str, int] = field(default_factory=dict)
    kernel_shapes: int = 3
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "int8", "int4")
    policies: tuple[str, ...] = ("ours", "on_demand/none/lru")
    shares: tuple[float, ...] = (0.1, 0.5, 1.0)
    speed_shares: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    prompt_tokens: int = 256
    long_prompt_tokens: int = 1024
    new_tokens: int = 16
    speed_tokens: int = 64
    rounds: int = 5
    limit_s: float = 60.0

    @property
    def emulated(self) -> bool:
        """Whether no device is there."""
        return self.accelerator == EMULATED

    def to_json(self) -> str:
        """For the process of a section."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setting:
        """What `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        return cls(**values)


def setting_for(accelerator: str, kind: str, minutes: float) -> Setting:
    """The sizes that fit a budget; on the emulated device the smallest."""
    setting = Setting(accelerator, kind)
    if setting.emulated:
        return replace(
            setting, smaller=SMALL_MODEL, speed_layers=2, dtypes=("float32", "int4"), shares=(0.25, 1.0),
            speed_shares=(0.0, 0.5), prompt_tokens=24, long_prompt_tokens=48, new_tokens=4, speed_tokens=8, rounds=2,
        )  # fmt: skip
    if minutes < QUICK_BELOW_MINUTES:
        return replace(
            setting, speed_layers=4, kernel_shapes=1, dtypes=("bfloat16", "int4"), shares=(0.25, 1.0),
            speed_shares=(0.0, 0.25, 1.0), prompt_tokens=192, new_tokens=8, speed_tokens=32, rounds=2,
        )  # fmt: skip
    return setting
