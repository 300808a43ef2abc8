"""The tokenizer that belongs to a model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hybrimoe.checkpoint.dense import read_config
from hybrimoe.checkpoint.errors import stands_for
from hybrimoe.checkpoint.gguf.tokenizer import load_tokenizer as gguf_tokenizer
from hybrimoe.checkpoint.source import model_path
from hybrimoe.errors import ModelError
from hybrimoe.text_files import plain_texts

TOKENIZER_NAME = "tokenizer.json"
SENTENCEPIECE_NAME = "tokenizer.model"
SENTENCEPIECE_FIRST_BYTE = b"\n"
"""A serialized SentencePiece model begins with its first piece (field 1, of a length); files of tiktoken have the same
name, and begin with base64."""


def load_tokenizer(path_or_hub_id: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, GGUF file, hub id, or (None) the demo model.

    Raises ModelError where there is no model, or no tokenizer in it.
    """
    directory = model_path(path_or_hub_id)
    if directory.is_file():
        return gguf_tokenizer(directory)
    try:
        with plain_texts(directory) as plain:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(plain, trust_remote_code=False)
        tokenizer.name_or_path = str(directory)
    except Exception as error:  # tokenizers raises plain Exceptions; all are about the directory's files
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer of {directory} is code of its own (auto_map in tokenizer_config.json), which hybrimoe"
                " never runs; expected tokenizer.json, which such a tokenizer can be converted to"
            ) from error
        read_config(directory)  # which says what is wrong where it is the configuration
        if (lacking := _lacking(directory)) is not None:
            raise ModelError(lacking) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            stands_for(directory / TOKENIZER_NAME)
            or f"{directory} has no usable tokenizer ({reason}); expected {TOKENIZER_NAME} beside the weights"
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes where there are no files of one
        raise ModelError(f"{directory} has no tokenizer; expected {TOKENIZER_NAME} beside the weights: fetch it, too")
    return tokenizer


def _lacking(directory: Path) -> str | None:
    """Which packages a tokenizer.model needs that are not installed, and what to do; None where that is not it."""
    file = directory / SENTENCEPIECE_NAME
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        is_sentencepiece = opened.read(1) == SENTENCEPIECE_FIRST_BYTE
    packages = ("sentencepiece", "google.protobuf") if is_sentencepiece else ("tiktoken",)
    if all(_is_installed(package) for package in packages):
        return None
    names = " ".join(package.removeprefix("google.") for package in packages)
    return (
        f"{directory} has its tokenizer as {SENTENCEPIECE_NAME} only, which is read with other packages: pip install"
        f" {names}; or fetch {TOKENIZER_NAME}, which needs none, if the model's repository has it"
    )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False
