"""The dense model of a GGUF file, as transformers' Llama in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybrimoe.checkpoint.errors import listed
from hybrimoe.checkpoint.gguf.config import shared_config
from hybrimoe.checkpoint.gguf.fields import Fields
from hybrimoe.checkpoint.gguf.file import open_gguf
from hybrimoe.checkpoint.gguf.weights import sources_of
from hybrimoe.errors import ModelError

__all__ = ["read_dense"]

ARCHITECTURE = "llama"


def read_dense(path: Path) -> LlamaForCausalLM:
    """The model of a GGUF file, ready to be called.

    Raises ModelError for another architecture, for one with experts, and for tensors that a Llama does not have;
    CheckpointError for a damaged file.
    """
    model = open_gguf(path)
    fields = Fields(model)
    if fields.architecture != ARCHITECTURE or fields.given("expert_count"):
        what = "has experts already" if fields.given("expert_count") else f"is a {fields.architecture} model"
        raise ModelError(f"{path} {what}; expected a dense model of the architecture {ARCHITECTURE}")
    config = LlamaConfig(**shared_config(fields) | {"dtype": "float32"})
    weights = {name: source.read().float() for name, source in sources_of(model, config.to_dict()).items()}
    with torch.device("meta"):
        dense = LlamaForCausalLM(config)
    missing, unexpected = dense.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing or unexpected:
        raise ModelError(
            f"{path} is no plain Llama: it lacks {listed(missing) or 'nothing'} and has {listed(unexpected) or 'no'}"
            " tensors beyond; expected one without biases and without adapters"
        )
    dense.tie_weights()
    dense.model.rotary_emb = type(dense.model.rotary_emb)(config)  # its tables are no weights: nothing has filled them
    return dense.eval()
