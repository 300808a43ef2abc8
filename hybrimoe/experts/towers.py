"""Towers of a model: what it has for images and sound, beside its language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["in_tower", "remove_towers", "tower_paths"]

OTHER_SENSES = ("vision_config", "audio_config")
"""Parts of the configuration of a model that has towers."""


def tower_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that text never goes through: neighbours of the language model and of what holds it, but for
    those without weights (a cap on logits)."""
    config = getattr(model, "config", None)
    if not any(getattr(config, name, None) is not None for name in OTHER_SENSES):
        return ()
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    path = next((path for path, module in model.named_modules() if module is embeddings), "")
    language, _, _ = path.rpartition(".")
    found: list[str] = []
    at: Any = model
    here = ""
    for name in language.split(".") if language else []:
        for other, child in at.named_children():
            if other != name and child is not output and any(True for _ in child.parameters()):
                found.append(f"{here}{other}")
        at, here = getattr(at, name), f"{here}{name}."
    return tuple(found)


def in_tower(path: str, towers: tuple[str, ...]) -> bool:
    """Whether a module or parameter is one of the `towers`, or stands in one."""
    return any(path == tower or path.startswith(f"{tower}.") for tower in towers)


def remove_towers(model: nn.Module) -> tuple[str, ...]:
    """Takes the towers out of a model, which then takes text only; returns their paths."""
    paths = tower_paths(model)
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, None)
    return paths
