"""The demo model: a small Qwen3-MoE language model trained by the code in this package, shipped as package data.

Importing this module loads neither torch nor transformers.
"""

from importlib.resources import files
from pathlib import Path

from hybrimoe.errors import ModelError

__all__ = ["HELD_OUT_FILE", "demo_model_path"]

HELD_OUT_FILE = "held-out.txt"
"""Name of the text in a model's directory that `hybrimoe bench quality` reads."""


def demo_model_path() -> Path:
    """Directory of the shipped model in Hugging Face layout (config.json, tokenizer.json, model.safetensors).

    Raises:
        ModelError: the installation carries no model (a source tree without the package data).
    """
    directory = Path(str(files("hybrimoe.demo").joinpath("model")))
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"expected the demo model's config.json in {directory}, found none; reinstall hybrimoe, or train the "
            f"model with: python -m hybrimoe.demo.training.train --corpora DIR --out RUN --export {directory}"
        )
    return directory
