"""Towers of a model: what it has for images and sound, beside its language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["in_tower", "remove_towers", "tower_paths"]

OTHER_SENSES = ("vision_config", "audio_config")
"""Parts of the configuration of a model that has towers."""


def tower_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that text never goes through: neighbours of the language model and of what holds it, but for
    those without weights (a cap on logits)."""
    holders = list(_holders(model))
    if not holders:
        return ()
    found: list[str] = []
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    for here, holder, inner in holders:
        for name, child in holder.named_children():
            if name != inner and child is not output and any(True for _ in child.parameters()):
                found.append(f"{here}{name}")
    return tuple(found)


def _holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path with a dot, module, name of the next) of what holds the language model, outermost first; none of a model
    without towers."""
    config = getattr(model, "config", None)
    if not any(getattr(config, name, None) is not None for name in OTHER_SENSES):
        return
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    path = next((path for path, module in model.named_modules() if module is embeddings), "")
    language, _, _ = path.rpartition(".")
    at: Any = model
    here = ""
    for name in language.split(".") if language else []:
        yield here, at, name
        at, here = getattr(at, name), f"{here}{name}."


def in_tower(path: str, towers: tuple[str, ...]) -> bool:
    """Whether a module or parameter is one of the `towers`, or stands in one."""
    return any(path == tower or path.startswith(f"{tower}.") for tower in towers)


def remove_towers(model: nn.Module) -> tuple[str, ...]:
    """Takes the towers out of a model, which then takes text only; returns their paths. Vectors that are put between
    images become zeros that no checkpoint has: transformers looks for them also where nothing is seen."""
    paths, vectors = tower_paths(model), []
    for here, holder, _ in list(_holders(model)):
        for name, vector in list(holder.named_parameters(recurse=False)):
            delattr(holder, name)
            zeros = vector.new_zeros(vector.shape, device="cpu")
            zeros._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves such tensors as they are
            holder.register_buffer(name, zeros, persistent=False)
            vectors.append(f"{here}{name}")
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, None)
    return (*paths, *vectors)
