"""A loaded model is the model that transformers loads, whatever the form of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GptOssConfig,
    GraniteMoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import hybrimoe
from cpu_kernels import DTYPES, pack_expert
from hybrimoe.checkpoint import load
from hybrimoe.dense.linear import PackedLinear
from hybrimoe.errors import ConfigError, ModelError
from hybrimoe.experts.layout import find_experts, read

from .conftest import SMALL
from .models import FLOAT32, TOKENS, logits

MEAN_ERROR_INT4 = 0.2
MEAN_ERROR_INT8 = 0.1  # of logits this small a model: int8 activations of 32 values, now and then another expert


def assert_same_model(loaded: PreTrainedModel, expected: PreTrainedModel) -> None:
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-5, atol=1e-5)


def test_one_file(directory: Path, mixtral: PreTrainedModel) -> None:
    model = hybrimoe.load(directory, **FLOAT32)
    assert isinstance(model.hybrimoe, hybrimoe.Injection)
    assert model.training is False
    assert_same_model(model, mixtral)


def test_shards(tmp_path: Path, mixtral: PreTrainedModel) -> None:
    mixtral.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same_model(load(tmp_path / "sharded", **FLOAT32), mixtral)


@pytest.mark.parametrize(
    "config",
    [
        GptOssConfig(**SMALL, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        GraniteMoeConfig(**SMALL),
        Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, tie_word_embeddings=True),
    ],
    ids=["transposed-interleaved-biased", "fused-on-disk", "tied"],
)
def test_forms_of_checkpoints(config: Any, tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    plain = make_model(config)
    plain.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", **FLOAT32)
    assert_same_model(model, plain)
    if config.tie_word_embeddings:
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_store_holds_what_packing_the_loaded_experts_gives(
    dtype: Any, directory: Path, mixtral: PreTrainedModel
) -> None:
    store = load(directory, **FLOAT32 | {"expert_dtype": dtype}).hybrimoe.session.store
    for layer, (path, module) in enumerate(find_experts(mixtral)):
        layout = read(module)
        spec = layout.spec(dtype)
        assert store.layers[layer].path == path
        for expert in range(layout.num_experts):
            expected = np.zeros(spec.record_bytes, dtype=np.uint8)
            pack_expert(spec, layout.expert(expert), expected)
            assert np.array_equal(store.record(layer, expert), expected), (layer, expert)


def test_weights_are_cast_to_the_dense_dtype_and_buffers_are_right(directory: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model = load(directory, **FLOAT32, dense_dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    for (name, value), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert value.dtype == expected.dtype, name
        assert torch.equal(value, expected), name
    dense = {name: value for name, value in plain.named_parameters() if ".experts." not in name}
    assert dense.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in dense.items())
    assert not any(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize(("dtype", "mean_error"), [("int8", MEAN_ERROR_INT8), ("int4", MEAN_ERROR_INT4)])
def test_dense_weights_packed(dtype: str, mean_error: float, directory: Path, mixtral: PreTrainedModel) -> None:
    model = load(directory, **FLOAT32, dense_dtype=dtype)
    packed = {name: module.spec.dtype for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed["model.layers.0.self_attn.q_proj"] == dtype
    assert packed["lm_head"] == "int8", "the logits' own layer never goes below it"
    assert not any("gate" in name for name in packed), "routers stay as they are"
    expected = logits(mixtral)
    assert float((logits(model) - expected).abs().mean() / expected.abs().mean()) < mean_error
    with pytest.raises(ModelError, match=f"dense layers were loaded as {dtype}"):
        model.hybrimoe.restore()


def test_generation_goes_on_from_the_loaded_model(directory: Path, mixtral: PreTrainedModel) -> None:
    model = load(directory, **FLOAT32)
    tokens = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, mixtral.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0))


def test_layers_that_the_rules_leave_alone_are_loaded_as_they_are(directory: Path, mixtral: PreTrainedModel) -> None:
    rules = [
        {"match": {"class": "MixtralExperts", "layers": "1"}, "replace": {"op": "cpu_experts"}},
    ]
    model = load(directory, **FLOAT32, rules=rules)
    assert list(model.hybrimoe.originals) == ["model.layers.1.mlp.experts"]
    kept = model.model.layers[0].mlp.experts
    assert torch.equal(kept.gate_up_proj, mixtral.model.layers[0].mlp.experts.gate_up_proj)
    assert_same_model(model, mixtral)


def test_progress_rises_to_the_size_of_the_store(directory: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    model = load(directory, **FLOAT32 | {"progress": lambda *call: calls.append(call)})
    packing = [(done, total) for done, total, what in calls if what == "packing experts"]
    assert len(packing) == 8
    assert packing == sorted(packing)
    assert packing[-1] == (model.hybrimoe.session.store.nbytes,) * 2


def test_a_bar_is_drawn_on_stderr_only_when_asked(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(directory, **FLOAT32)
    assert capfd.readouterr() == ("", "")
    load(directory, **FLOAT32 | {"progress": True}, packed_file=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert err != ""


def test_the_demo_model_is_what_no_path_means(own_cache: Path) -> None:
    model = load(config={}, **FLOAT32 | {"expert_dtype": "bfloat16"})
    assert model.config.model_type == "qwen3_moe"
    assert list(own_cache.rglob("*.hybrimoe")), "its packed file is in the cache, not in the package"


def test_restore_gives_the_checkpoints_weights_back(directory: Path, mixtral: PreTrainedModel) -> None:
    model = load(directory, **FLOAT32)
    model.hybrimoe.restore()
    expected = mixtral.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert_same_model(model, mixtral)


def test_restore_of_a_bfloat16_model_from_a_bfloat16_store(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    plain = make_model(dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", **FLOAT32 | {"expert_dtype": "bfloat16"})
    model.hybrimoe.restore()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no torch accelerator here")
def test_restore_after_running_on_a_device_leaves_all_of_it_on_the_cpu(
    directory: Path, mixtral: PreTrainedModel
) -> None:
    model = load(directory, **FLOAT32 | {"accelerator": "auto"})
    model.hybrimoe.restore()
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    assert_same_model(model, mixtral)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_restore_refuses_what_would_lose_bits(dtype: str, directory: Path) -> None:
    model = load(directory, **FLOAT32 | {"expert_dtype": dtype})
    with pytest.raises(ModelError, match=f"a store of {dtype}.*cannot be had back.*float32"):
        model.hybrimoe.restore()
    assert logits(model).isfinite().all(), "the refused model still runs"


def test_unknown_keys_takes_two_words(directory: Path) -> None:
    with pytest.raises(ConfigError, match="unknown_keys"):
        load(directory, **FLOAT32, unknown_keys="whatever")  # type: ignore[arg-type]


def test_sampling_defaults_come_with_the_checkpoint(directory: Path) -> None:
    GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=5).save_pretrained(directory)
    loaded = load(directory, accelerator="none", expert_dtype="float32", progress=False)
    assert loaded.generation_config.do_sample
    assert loaded.generation_config.temperature == 0.7
    assert loaded.generation_config.eos_token_id == 5


def test_a_damaged_generation_config_is_named(directory: Path) -> None:
    (directory / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        load(directory, accelerator="none", expert_dtype="float32", progress=False)
