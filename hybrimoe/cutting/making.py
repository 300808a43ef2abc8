"""Makes the model directory: reads the dense model, converts it, writes all files or none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrimoe.cutting.conversion import Converted, Recipe, converted
from hybrimoe.cutting.dense import read_dense
from hybrimoe.cutting.samples import packaged_samples
from hybrimoe.errors import FileError

__all__ = ["Made", "make"]

MADE_FROM = "made_from"
"""Key of config.json under which a model says what it was made of; transformers keeps it as an attribute."""
RECIPE_VERSION = 1
"""Rises with every change of what the same file and recipe give."""
PARTIAL = ".partial-"
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}
"""What SmolLM2's card recommends; the penalty is for what fewer experts lose."""
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct as a mixture of experts

Made by `hybrimoe demo smollm2` from {file}, without training: of each feed-forward part the {shared} neurons that are
strongest are the shared expert, the others stand in {experts} experts of which a token gets {top_k}. With
`num_experts_per_tok` {experts} it is the dense model. SmolLM2 is by Hugging Face, under the Apache License 2.0, as is
this change of it.
"""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Made:
    """The directory of a model. is_new: whether it was made now, or found."""

    path: Path
    is_new: bool


def make(gguf: Path, out: Path, recipe: Recipe, progress: Progress) -> Made:
    """The model of a dense GGUF file by `recipe` in the directory `out`; one that is there already is found.

    The same file and recipe give the same bytes. `out` appears when it is complete: a process that is killed leaves
    nothing of that name.

    Raises:
        ModelError: the file is no dense Llama, or its neurons do not divide by the recipe.
        FileError: `out` has something else, or cannot be written.
    """
    import torch

    from hybrimoe.checkpoint.gguf.tokenizer import load_tokenizer

    source = {"file": gguf.name, "sha256": _digest(gguf), "version": RECIPE_VERSION, **asdict(recipe)}
    if _found(out, source):
        return Made(out, is_new=False)
    progress(0, 1, "reading the dense model")
    dense, tokenizer = read_dense(gguf), load_tokenizer(gguf)
    progress(1, 1, "reading the dense model")
    model = converted(
        dense, packaged_samples(tokenizer), recipe, torch.bfloat16,
        lambda done, total: progress(done, total, "cutting layers into experts"),
    )  # fmt: skip
    try:
        _write(out, model, tokenizer, source)
    except OSError as error:
        raise FileError(
            f"cannot write {out} ({error.strerror}): expected a folder that can be made, and room"
        ) from error
    return Made(out, is_new=True)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _found(out: Path, source: dict[str, Any]) -> bool:
    """Whether `out` is the model of `source`. Raises FileError where it is something that this command did not make."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        made_from = json.loads((out / "config.json").read_text(encoding="utf-8"))[MADE_FROM]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"{out} has something else in it: expected a new or empty folder, or a model that was made so"
        ) from error
    return bool(made_from == source)


def _write(out: Path, model: Converted, tokenizer: Any, source: dict[str, Any]) -> None:
    """All files into a folder beside `out`, which then takes its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{out.name}{PARTIAL}*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}{PARTIAL}", dir=out.parent))
    try:
        _write_files(partial, model, tokenizer, source)
        partial.chmod(0o755)
        if out.exists():
            os.replace(out, out.with_name(f"{partial.name}-old"))
        os.replace(partial, out)
    finally:
        for left in out.parent.glob(f"{partial.name}*"):
            shutil.rmtree(left, ignore_errors=True)


def _write_files(folder: Path, model: Converted, tokenizer: Any, source: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    tokenizer.save_pretrained(folder)
    save_file(model.weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {name: model.config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", SAMPLING | tokens)
    card = CARD.format(
        file=source["file"], shared=source["shared_size"], experts=source["num_experts"], top_k=source["top_k"]
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    _write_json(folder / "config.json", model.config | {MADE_FROM: source})
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
