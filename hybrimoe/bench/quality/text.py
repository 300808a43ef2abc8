"""The text that quality figures are taken on, as windows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from hybrimoe.demo import HELD_OUT_FILE
from hybrimoe.errors import ModelError
from hybrimoe.text_files import read_text

WINDOW = 512  # tokens of a window of text


def quality_text(folder: Path, text: Path | None) -> tuple[str, str]:
    """The name of a text and what stands in it; text None: the held-out text beside the model, else its model card.

    Raises ModelError where there is none.
    """
    named = [folder / HELD_OUT_FILE, folder / "README.md"] if text is None else [text]
    path = next((candidate for candidate in named if candidate.is_file()), None)
    if path is None:
        raise ModelError(f"there is no text at {' or '.join(map(str, named))}; name one with --text")
    return path.name, read_text(path)


def text_windows(folder: Path, text: Path | None, count: int) -> tuple[list[torch.Tensor], str]:
    """Token ids [WINDOW] of at most `count` windows, evenly spread over the text, and the text's name.

    text None: the held-out text beside the model, else its model card. Raises ModelError where there is none.
    """
    from hybrimoe.checkpoint import load_tokenizer

    name, read = quality_text(folder, text)
    encoded = load_tokenizer(folder)(read, verbose=False)["input_ids"]
    windows = [window for window in torch.tensor(encoded).split(WINDOW) if len(window) > 1]
    if not windows:
        raise ModelError(f"{name} is too short")
    whole = [window for window in windows if len(window) == WINDOW] or windows
    some = min(count, len(whole))
    return [whole[index * len(whole) // some] for index in range(some)], name


@torch.inference_mode()
def window_logits(model: Any, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits float32 [tokens, V] of each window, computed as one prompt."""
    return [model(window.unsqueeze(0)).logits[0].float() for window in windows]


def compare(
    logits: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], targets: Sequence[torch.Tensor],
    also: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[float, float, float]:  # fmt: skip
    """Perplexity, share of positions with the same greedy token, and the mean of `also(mine, theirs)` [tokens].

    targets: the next token at each position but, where it is not known, the last.
    """
    losses, same, others = [], [], []
    for mine, theirs, target in zip(logits, expected, targets, strict=True):
        losses.append(functional.cross_entropy(mine[: len(target)], target, reduction="none"))
        same.append((mine.argmax(1) == theirs.argmax(1)).float())
        others.append(also(mine, theirs))
    return (
        float(torch.cat(losses).mean().exp()), float(torch.cat(same).mean()), float(torch.cat(others).mean())
    )  # fmt: skip
