"""Models with towers for images and sound around a language model with experts: these are found and run inside the
wrapper, with text alone and with an image; encoder-decoder models are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, VOCABULARY, WRAPPED, Tiny, built, prompt
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hybrimoe
from hybrimoe.errors import UnsupportedExpertsError
from hybrimoe.experts.layout import find_experts
from hybrimoe.experts.towers import remove_towers

PLAIN: dict[str, Any] = {"accelerator": "none", "expert_dtype": "float32", "backend": "torch", "step": "transformers"}
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def assert_same(model: PreTrainedModel, **inputs: Any) -> None:
    """Tokens and logits are those of the model before it was injected, and its experts ran."""
    with torch.no_grad():
        expected, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        with hybrimoe.inject(model, **PLAIN) as injection:
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
            assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
            assert injection.stats().total.cpu_experts > 0


@pytest.mark.parametrize("family", WRAPPED)
def test_text_through_a_wrapper(family: str) -> None:
    model = built(WRAPPED[family], whole=True)
    assert type(model).__name__.endswith("ForConditionalGeneration")
    assert_same(model, input_ids=prompt(1))


@pytest.mark.parametrize("family", [*WRAPPED, *(name for name, tiny in FAMILIES.items() if tiny.text is not None)])
def test_text_is_the_same_without_the_towers(family: str) -> None:
    model = built(WRAPPED.get(family) or FAMILIES[family], whole=True)
    inputs = {"input_ids": prompt(1)}
    with torch.no_grad():
        expected = model(**inputs).logits
        assert remove_towers(model)
        assert torch.equal(model(**inputs).logits, expected)


def test_experts_of_a_tower_stay_as_they_are() -> None:
    model = built(WRAPPED["dots3_note"], whole=True)
    tower = model.model.vision_tower
    (experts,) = (module for module in tower.modules() if type(module).__name__ == "Dots3NoteExperts")
    assert all(path.startswith("model.language_model.") for path, _ in find_experts(model))
    with hybrimoe.inject(model, **PLAIN):
        assert any(module is experts for module in tower.modules())
        assert type(model.model.language_model.layers[0].mlp.experts) is not type(experts)


def test_an_image_through_a_wrapper() -> None:
    images = pytest.importorskip("PIL.Image")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    processor = Qwen2VLImageProcessorPil(**sizes, size={"shortest_edge": 64, "longest_edge": 1024})
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    seen = processor(images=[images.fromarray(pixels)], return_tensors="pt")
    model = built(Tiny("qwen3_vl_moe", {"image_token_id": 90, "vision_start_token_id": 91}, text={}))
    n_tokens = int(seen["image_grid_thw"].prod()) // sizes["merge_size"] ** 2
    text = prompt(1)
    tokens = torch.cat([text[:, :3], torch.tensor([[91]]), torch.full((1, n_tokens), 90), text[:, 3:]], dim=1)
    types = (tokens == 90).int()
    without = model(input_ids=tokens).logits
    inputs = {"input_ids": tokens, "mm_token_type_ids": types, **seen}
    assert not torch.equal(model(**inputs).logits, without), "the image counts"
    assert_same(model, **inputs)


@pytest.mark.parametrize(
    ("model_type", "sizes", "named"),
    [
        ("switch_transformers", {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
                                 "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
         "SwitchTransformersExperts"),
        ("nllb-moe", {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
                      "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_sparse_step": 1,
                      "decoder_sparse_step": 1}, "NllbMoeExperts"),
    ],
)  # fmt: skip
def test_encoder_decoder_models_are_refused_by_name(model_type: str, sizes: dict[str, Any], named: str) -> None:
    config = CONFIG_MAPPING[model_type](vocab_size=VOCABULARY, d_model=32, num_experts=4, **sizes)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(UnsupportedExpertsError, match=rf"\({named}\) cannot be replaced: each expert is a module"):
        hybrimoe.inject(model, **PLAIN)
