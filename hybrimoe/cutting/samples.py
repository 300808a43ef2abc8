"""Text on which the neurons of a dense model are looked at: SmolLM2's own, so that no other text is needed.

`samples.json` has 32 texts which SmolLM2-135M-Instruct (Q4_1, float32 arithmetic) wrote: answers to questions through
its chat template and continuations of openings, 112 new tokens each at most, sampled at temperature 1 with seed 0. They
make little sense, and need not: what counts is which neurons are at work together when the model writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

__all__ = ["Samples", "packaged_samples"]

FILE = Path(__file__).with_name("samples.json")


@dataclass(frozen=True, slots=True)
class Samples:
    """Token ids [B, T], padded on the left; `mask` [B, T] is 1 where a token counts."""

    token_ids: torch.Tensor
    mask: torch.Tensor


def packaged_samples(tokenizer: PreTrainedTokenizerBase) -> Samples:
    """The texts as tokens of a model, some 3,900 of SmolLM2's own."""
    texts = json.loads(FILE.read_text(encoding="utf-8"))
    tokens = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    longest = max(map(len, tokens))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in tokens])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens])
    return Samples(ids, mask)
