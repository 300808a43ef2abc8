"""Writes a trained model as the package ships it."""

import os
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3MoeForCausalLM

__all__ = ["export_model"]

SAMPLING = {
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.95,
    "top_k": 50,
    "repetition_penalty": 1.1,
    "max_new_tokens": 200,
}
"""Defaults written to generation_config.json: greedy text of so small a model repeats itself."""


def export_model(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Saves a bfloat16 copy of `model` and `tokenizer` in `directory`, in Hugging Face layout, one tensor an expert.

    Each file is written beside its place and then moved there: who reads meanwhile sees a whole file, old or new.
    """
    copy = Qwen3MoeForCausalLM._from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    copy.generation_config = GenerationConfig(**ids, **SAMPLING)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        copy.save_pretrained(name)
        tokenizer.save_pretrained(name)
        for file in sorted(Path(name).iterdir()):
            file.chmod(0o644)
            os.replace(file, directory / file.name)
