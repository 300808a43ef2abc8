"""The way back from packed records to a family's own experts module."""

from __future__ import annotations

import torch
from torch import nn

from hybrimoe.errors import ModelError
from hybrimoe.experts.layout import read
from hybrimoe.runtime.store import ExpertStore

PRECISION_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}  # of the significand
STORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rebuild_experts(module: nn.Module, store: ExpertStore, layer: int) -> None:
    """Gives an experts module on the meta device its weights back from `store`, bit for bit, in place.

    Entries that no expert reads (the first projection's, of identity experts) become zeros.
    Raises ModelError where the store holds less than the module (int8, int4, bfloat16 of a float32 model, or only some
    of the experts).
    """
    _require_lossless(module, store, layer)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            setattr(module, name, nn.Parameter(torch.zeros_like(parameter, device="cpu"), requires_grad=False))
    layout = read(module)
    for expert in range(layout.num_experts):
        layout.assign(expert, store.read(layer, expert))


def _require_lossless(module: nn.Module, store: ExpertStore, layer: int) -> None:
    if not store.complete:
        raise ModelError(
            f"{store.layers[layer].path}: some experts are kept in low precision only (scheduler.lossy), from which"
            " the model's weights cannot be had back; load the model again without it"
        )
    stored = store.layers[layer].spec.dtype
    wanted = next(module.parameters(recurse=False)).dtype
    exact = stored in STORE_DTYPES and PRECISION_BITS[STORE_DTYPES[stored]] >= PRECISION_BITS[wanted]
    if not exact:
        raise ModelError(
            f"{store.layers[layer].path}: the experts were loaded straight into a store of {stored}, from which the"
            f" model's {wanted} weights cannot be had back; load with expert_dtype float32"
            + (" or bfloat16" if wanted == torch.bfloat16 else "")
            + ", or load the model again with transformers"
        )
