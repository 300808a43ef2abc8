"""What the tests of loading share: how a model is loaded, what it answers, and which packed files it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hybrimoe.checkpoint import load

TOKENS = torch.arange(3, 15)[None]
OPTIONS: dict[str, Any] = {"policy": "static", "accelerator": "none", "expert_dtype": "bfloat16", "progress": False}
FLOAT32: dict[str, Any] = OPTIONS | {"expert_dtype": "float32"}
DENSE_OPTIONS: dict[str, Any] = OPTIONS | {"expert_dtype": "int4", "dense_dtype": "int8"}


def logits(model: PreTrainedModel) -> torch.Tensor:
    """What `model` gives for TOKENS."""
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=TOKENS).logits
    return output


def files_of(what: str, directory: Path) -> list[Path]:
    """The packed files in and below `directory`. what: "experts" or "dense"."""
    return sorted(directory.rglob(f"{what}-*.hybrimoe"))


def done_in_loading(directory: Path, **options: Any) -> set[str]:
    """Loads with dense layers packed, too; what it showed as its progress."""
    calls: set[str] = set()
    load(directory, **DENSE_OPTIONS | {"progress": lambda *call: calls.add(call[2])} | options)
    return calls
