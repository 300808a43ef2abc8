"""Checkpoints whose layers were pruned to different numbers of experts, which config.json has no place for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from hybrimoe.checkpoint import convert, load
from hybrimoe.checkpoint.errors import LeftOutWarning
from hybrimoe.checkpoint.inspection import inspect
from hybrimoe.errors import CheckpointError, ModelError

from .conftest import SMALL
from .models import FLOAT32, OPTIONS, logits

FEWER = 3
SIZES = {name: value for name, value in SMALL.items() if name != "num_local_experts"}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
       "v_head_dim": 8}  # fmt: skip
FAMILIES: dict[str, Callable[[int], PreTrainedConfig]] = {
    "mixtral": lambda n: MixtralConfig(**SIZES, num_local_experts=n),
    "qwen3_moe": lambda n: Qwen3MoeConfig(**SIZES, num_experts=n, moe_intermediate_size=16),
    "olmoe": lambda n: OlmoeConfig(**SIZES, num_experts=n),
    "gpt_oss": lambda n: GptOssConfig(**SIZES, num_local_experts=n, head_dim=8, sliding_window=16),
    "deepseek_v3": lambda n: DeepseekV3Config(
        **SIZES | MLA, n_routed_experts=n, moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=0
    ),
}
Make = Callable[..., PreTrainedModel]


def pruned(make_model: Make, family: str, directory: Path, n_of_each: tuple[int, int] = (4, FEWER)) -> PreTrainedModel:
    """A model whose second layer has fewer experts, and its checkpoint with the config.json of the others."""
    model, other = (make_model(FAMILIES[family](n), std=std) for n, std in zip(n_of_each, (0.1, 0.2), strict=True))
    model.save_pretrained(directory)
    other.save_pretrained(directory.with_name("other"))
    files = [folder / "model.safetensors" for folder in (directory, directory.with_name("other"))]
    kept, fewer = map(load_file, files)
    tensors = {key: value for key, value in kept.items() if "layers.1." not in key}
    tensors |= {key: value for key, value in fewer.items() if "layers.1." in key}
    save_file(tensors, files[0], metadata={"format": "pt"})
    model.model.layers[1] = other.model.layers[1]
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_has_the_experts_that_the_checkpoint_has(family: str, make_model: Make, tmp_path: Path) -> None:
    expected = logits(pruned(make_model, family, tmp_path / "model"))
    model = load(tmp_path / "model", packed_file=False, **FLOAT32)
    assert [layer.num_experts for layer in model.hybrimoe.session.layer_specs()] == [4, FEWER]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_packs_replies_and_experts_on_disk(make_model: Make, tmp_path: Path) -> None:
    reference = pruned(make_model, "mixtral", tmp_path / "model", (8, 6))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = torch.arange(3, 9)[None]
    expected = reference.generate(tokens, **options)
    on_disk = load(tmp_path / "model", memory={"host": 9, "disk": "auto"}, **FLOAT32)
    assert torch.equal(on_disk.generate(tokens, **options), expected)
    on_disk.hybrimoe.session.close()
    with pytest.raises(ModelError, match=r"have 6 to 8 experts, which run on the CPU only: .*--accelerator none"):
        load(tmp_path / "model", **FLOAT32 | {"accelerator": "emulated", "gpu_expert_slots": 5})
    convert(tmp_path / "model", tmp_path / "pack", expert_dtype="float32", progress=False)
    assert torch.equal(load(tmp_path / "pack", **FLOAT32).generate(tokens, **options), expected)
    assert inspect(tmp_path / "model").other == ()


def test_a_layer_that_lacks_experts_is_no_pruned_one(make_model: Make, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    cut = {key: value for key, value in tensors.items() if "layers.1.block_sparse_moe.experts.3." not in key}
    save_file(cut, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"config\.json asks for 4 experts, the checkpoint has 3 like"):
        load(tmp_path, **OPTIONS)


def test_experts_of_other_stacks_are_not_counted(make_model: Make, tmp_path: Path) -> None:
    """A pruned model whose layers for several tokens at once were left as they were."""
    expected = logits(model := make_model())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gate = {"mtp.layers.0.block_sparse_moe.gate.weight": torch.zeros(6, SMALL["hidden_size"])}
    experts = {f"mtp.layers.0.block_sparse_moe.experts.{n}.w1.weight": torch.zeros(48, 32) for n in range(6)}
    save_file(tensors | gate | experts, file, metadata={"format": "pt"})
    with pytest.warns(LeftOutWarning):
        found = load(tmp_path, packed_file=False, **FLOAT32)
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)


def test_fewer_experts_than_a_token_is_routed_to(make_model: Make, tmp_path: Path) -> None:
    pruned(make_model, "mixtral", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 4'))
    with pytest.raises(ModelError, match=r"layer 1 has 3 experts .* config\.json routes each token to 4"):
        load(tmp_path / "model", **OPTIONS)
