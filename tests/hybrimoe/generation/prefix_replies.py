"""Replies of tiny models with a prefix cache, each compared with the one that its prompt gets alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hybrimoe
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.generation.continuous_batching import BatchEngine
from hybrimoe.generation.prefix.blocks import PrefixTree
from hybrimoe.generation.prefix.disk import DiskLevel

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import Letters
from tiny_families import tiny_model as tiny_family

GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=6, ignore_eos=True)
PLENTY = 1 << 30
SYSTEM = [5 + n * n % 83 for n in range(100)]
PART = 48


def made(family: str) -> TextGenerator:
    model = tiny_family(family)
    model.config.get_text_config(decoder=True).max_position_embeddings = 512
    if family == "qwen2_moe":
        hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    return TextGenerator(model, Letters())


class Counting:
    """An engine with a prefix cache, which counts the prompt tokens that it computes."""

    def __init__(
        self, generator: TextGenerator, max_bytes: int = PLENTY, parallel: int = 2, disk: DiskLevel | None = None
    ) -> None:
        self.generator = generator
        self.tree = PrefixTree(generator.model, max_bytes, disk)
        self.engine = BatchEngine(generator, parallel=parallel, prefixes=self.tree, part_tokens=PART)

    def answers(self, *prompts: list[int], options: SamplingOptions = GREEDY) -> list[Any]:
        """The replies to prompts that come at the same time; each is the one that the prompt gets alone."""
        waiting, replies = list(prompts), []
        while waiting or self.engine.n_running:
            while waiting and self.engine.has_room(waiting[0], options):
                replies.append(self.engine.admit(waiting.pop(0), options, lambda: False))
            assert all(progress.error is None for progress in self.engine.step())
        for prompt, reply in zip(prompts, replies, strict=True):
            alone = self.generator.reply(prompt, options, part_tokens=PART)
            assert "".join(alone) == reply.text
            assert alone.token_ids == reply.token_ids
        return replies


FAMILIES = ("qwen2_moe", "deepseek_v2", "gpt_oss", "qwen3_next", "lfm2_moe")
"""Plain and compiled, latent attention, sliding windows, linear attention, convolutions."""


def has_plain_layers_only(generator: TextGenerator) -> bool:
    return not PrefixTree(generator.model, 1)._needs_checkpoints
