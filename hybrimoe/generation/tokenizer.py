"""The tokenizer of a model directory or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrimoe.errors import ModelError

__all__ = ["load_tokenizer"]


def load_tokenizer(model: str | Path | None) -> Any:
    """The tokenizer beside the weights of `model` (None: of the demo model).

    Raises:
        ModelError: the directory is not there, or holds no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    if model is None:
        from hybrimoe.demo import demo_model_path

        model = demo_model_path()
    _check_directory(str(model))
    try:
        return AutoTokenizer.from_pretrained(str(model))
    except Exception as error:  # transformers raises anything here, from KeyError to the hub's own classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"no tokenizer in {model}: expected tokenizer.json or tokenizer.model with tokenizer_config.json; {reason}"
        ) from error


def _check_directory(model: str) -> None:
    """A path that does not exist must not be looked up on the hub."""
    path = Path(model)
    looks_like_a_path = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if looks_like_a_path and not path.expanduser().is_dir():
        what = "a file" if path.is_file() else "nothing"
        raise ModelError(f"expected a model directory (config.json and *.safetensors) at {model}, found {what}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{model} is no model: expected a config.json in it, found none")
