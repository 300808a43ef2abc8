"""Tiny models that see: checkpoints on disk, with a tokenizer, an image processor and a chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_families import FAMILIES, WRAPPED, Tiny, built
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hybrimoe.experts.towers import in_tower, tower_paths

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
PLACEHOLDER, PAD, END = "<|image_pad|>", "<|endoftext|>", "<|im_end|>"
ROLES = {
    **dict.fromkeys(("image_token",), PLACEHOLDER),
    **dict.fromkeys(("video_token",), "<|video_pad|>"),
    **dict.fromkeys(("image_start_token", "boi_token", "video_start_token"), "<|vision_start|>"),
    **dict.fromkeys(("image_end_token", "eoi_token", "video_end_token"), "<|vision_end|>"),
}
"""What processors ask of a tokenizer, each by its own name."""
TOWER_STD = 0.3
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {name: number for number, name in enumerate((*LETTERS, *SPECIAL))}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_PIXELS = {
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor", "patch_size": 4,
    "temporal_patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096},
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """A letter a token, and the special tokens of Qwen's models."""
    own = Tokenizer(models.BPE(VOCABULARY, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token=END, pad_token=PAD, additional_special_tokens=list(SPECIAL[1:3]),
        extra_special_tokens=ROLES,
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


@dataclass(frozen=True)
class Seeing:
    """A family that sees. tiny: its model; pixels: the settings of its image processor."""

    tiny: Tiny
    pixels: dict[str, Any]


def _seeing(tiny: Tiny, pixels: dict[str, Any]) -> Seeing:
    start, end = VOCABULARY["<|vision_start|>"], VOCABULARY["<|vision_end|>"]
    ids = {
        "image_token_id": VOCABULARY[PLACEHOLDER], "vision_start_token_id": start, "image_start_token_id": start,
        "image_end_token_id": end,
    }  # fmt: skip
    known = set(CONFIG_MAPPING[tiny.model_type].__dataclass_fields__)
    ids = {name: number for name, number in ids.items() if name in known}
    text = {**(tiny.text or {}), "vocab_size": len(VOCABULARY), "max_position_embeddings": 1024}
    return Seeing(replace(tiny, overrides={**tiny.overrides, **ids}, text=text), pixels)


FAMILIES_THAT_SEE = {
    "qwen3_vl_moe": _seeing(FAMILIES["qwen3_vl_moe"], QWEN_PIXELS),
    "qwen3_5_moe": _seeing(WRAPPED["qwen3_5_moe"], QWEN_PIXELS),
    "qwen4_exp": _seeing(WRAPPED["qwen4_exp"], QWEN_PIXELS),
    "glm4v_moe": _seeing(
        FAMILIES["glm4v_moe"],
        {**QWEN_PIXELS, "image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor"},
    ),
    "ernie4_5_vl_moe": _seeing(
        FAMILIES["ernie4_5_vl_moe"],
        {
            **QWEN_PIXELS,
            "image_processor_type": "Ernie4_5_VLMoeImageProcessor",
            "temporal_patch_size": 1,
            "processor_class": "Ernie4_5_VLMoeProcessor",
        },
    ),
    "gemma4": _seeing(
        replace(
            WRAPPED["gemma4"],
            text={
                **(WRAPPED["gemma4"].text or {}),
                "use_bidirectional_attention": "vision",
                "vocab_size_per_layer_input": len(VOCABULARY),
            },
        ),
        {
            "image_processor_type": "Gemma4ImageProcessor",
            "processor_class": "Gemma4Processor",
            "patch_size": 4,
            "max_soft_tokens": 70,
            "pooling_kernel_size": 3,
        },
    ),
    "glm5_next": _seeing(
        FAMILIES["glm5_next"],
        {
            "image_processor_type": "Glm5NextImageProcessor",
            "processor_class": "Glm5NextProcessor",
            "patch_size": 4,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "min_image_tokens": 4,
            "max_image_tokens": 64,
        },
    ),
}


def write_seeing(folder: Path, family: str = "qwen3_vl_moe", seed: int = 0) -> PreTrainedModel:
    """Writes the tiny model of a family that sees into `folder`; returns it as transformers has it."""
    one = FAMILIES_THAT_SEE[family]
    model = built(one.tiny, seed, whole=True)
    with torch.no_grad():  # so that what an image shows moves the logits by far more than rounding does
        for path, parameter in model.named_parameters():
            if in_tower(path, tower_paths(model)) and parameter.dim() > 1:
                parameter.normal_(std=TOWER_STD)
    model.generation_config.eos_token_id = VOCABULARY[END]
    model.generation_config.pad_token_id = VOCABULARY[PAD]
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(one.pixels), encoding="utf-8")
    return model


def picture(height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """Pixels uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
