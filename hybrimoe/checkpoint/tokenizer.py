"""The tokenizer that belongs to a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hybrimoe.checkpoint.dense import read_config
from hybrimoe.checkpoint.errors import stands_for
from hybrimoe.checkpoint.gguf.tokenizer import load_tokenizer as gguf_tokenizer
from hybrimoe.checkpoint.source import model_path
from hybrimoe.errors import ModelError

TOKENIZER_NAME = "tokenizer.json"


def load_tokenizer(path_or_hub_id: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, GGUF file, hub id, or (None) the demo model.

    Raises ModelError where there is no model, or no tokenizer in it.
    """
    directory = model_path(path_or_hub_id)
    if directory.is_file():
        return gguf_tokenizer(directory)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exceptions; all are about the directory's files
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer of {directory} is code of its own (auto_map in tokenizer_config.json), which hybrimoe"
                " never runs; expected tokenizer.json, which such a tokenizer can be converted to"
            ) from error
        read_config(directory)  # which says what is wrong where it is the configuration
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            stands_for(directory / TOKENIZER_NAME)
            or f"{directory} has no usable tokenizer ({reason}); expected {TOKENIZER_NAME} beside the weights"
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes where there are no files of one
        raise ModelError(f"{directory} has no tokenizer; expected {TOKENIZER_NAME} beside the weights: fetch it, too")
    return tokenizer
