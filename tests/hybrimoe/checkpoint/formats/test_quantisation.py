"""What a model directory says about its quantisation: read where it stands, refused by name where it is not read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe.checkpoint import UnsupportedCheckpointError, load
from hybrimoe.checkpoint.formats.quantisation import Quantisation, WeightGroup, check_tensor_names, read_quantisation
from hybrimoe.errors import CheckpointError

FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 64]}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


def compressed(weights: dict[str, Any], name: str) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("part", [None, "text_config", "llm_config"])
def test_it_is_found_wherever_a_config_names_it(key: str, part: str | None, tmp_path: Path) -> None:
    config = {key: FP8} if part is None else {part: {key: FP8}}
    where = f"config.json: {'' if part is None else part + '.'}{key}"
    assert read_quantisation(tmp_path, config) == Quantisation("fp8", where, (128, 64))


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_it_is_found_in_a_file_of_its_own(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(FP8))
    assert read_quantisation(tmp_path, {}) == Quantisation("fp8", name, (128, 64))


@pytest.mark.parametrize(
    ("entry", "block"),
    [
        ({"quant_method": "fp8"}, None),
        ({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, None),
        ({"fmt": "e4m3", "weight_block_size": [64, 32]}, (64, 32)),
        (compressed(FLOAT8, "float-quantized"), None),
        (compressed(FLOAT8 | {"block_structure": "128x64"}, "float-quantized"), (128, 64)),
        (compressed(FLOAT8 | {"block_structure": [128, 64]}, "naive-quantized"), (128, 64)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, None),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, None),
    ],
)
def test_what_is_read_as_fp8(entry: dict[str, Any], block: tuple[int, int] | None, tmp_path: Path) -> None:
    found = read_quantisation(tmp_path, {"quantization_config": entry})
    assert (found.method, found.block) == ("fp8", block)


def test_a_quantised_kv_cache_alone_is_no_quantisation_of_weights(tmp_path: Path) -> None:
    entry = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    assert read_quantisation(tmp_path, {"quantization_config": entry}) == Quantisation()


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"gptq \(marlin\)"),
        ({"bits": 4, "group_size": 128, "checkpoint_format": "bitblas"}, r"gptq \(bitblas\)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"awq \(gemv\)"),
        ({"w_bit": 4, "q_group_size": 128, "version": "GEMV_FAST"}, r"awq \(GEMV_FAST\)"),
        (compressed({"num_bits": 4, "type": "int"}, "marlin-24"), r"compressed-tensors \(marlin-24\)"),
        (compressed({"num_bits": 4, "type": "float"}, "float-quantized"), r"compressed-tensors \(float-quantized\)"),
        (
            compressed({"num_bits": 4, "type": "int"}, "pack-quantized")
            | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            r"compressed-tensors \(sparse-24-bitmask\)",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r"modelopt \(W4A8_AWQ\)"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
@pytest.mark.parametrize("where", ["config.json", "text_config", "quantize_config.json"])
def test_what_is_not_read_is_refused_by_name(entry: dict[str, Any], name: str, where: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {}
    if where.endswith("ze_config.json"):
        (tmp_path / where).write_text(json.dumps({"quant_method": None} | entry))
    else:
        config = {"quantization_config": entry} if where == "config.json" else {where: {"quantization_config": entry}}
    with pytest.raises(UnsupportedCheckpointError, match=f"quantised with {name};.*{where}.*Use the unquantised"):
        read_quantisation(tmp_path, config)


@pytest.mark.parametrize(
    ("file", "name"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", None)]
)
def test_a_file_that_names_no_method_is_its_programs(file: str, name: str | None, tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps({"group_size": 128}))
    found = read_quantisation(tmp_path, {})
    assert (found.method, found.group_size) == (name, None if name is None else 128)


@pytest.mark.parametrize(
    ("entry", "read"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False},
            Quantisation("gptq", bits=4, group_size=128, symmetric=False, act_order=True),
        ),
        (
            {"bits": 3, "group_size": -1, "checkpoint_format": "gptq_v2", "sym": True},
            Quantisation("gptq", bits=3, symmetric=True, zero_shift=0),
        ),
        ({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}, Quantisation("awq", bits=4, group_size=64, zero_shift=0)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, Quantisation("bitsandbytes")),
        ({"load_in_8bit": True}, Quantisation("bitsandbytes")),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, Quantisation("nvfp4")),
        (
            compressed({"num_bits": 4, "type": "int"}, "pack-quantized"),
            Quantisation("compressed-tensors", groups=(WeightGroup((), 4),)),
        ),
        (
            compressed(FLOAT8 | {"strategy": "group", "group_size": 64}, "float-quantized"),
            Quantisation("fp8", block=(1, 64), groups=(WeightGroup((), 8),)),
        ),
    ],
)
def test_what_is_said_of_codes_and_groups(entry: dict[str, Any], read: Quantisation, tmp_path: Path) -> None:
    found = read_quantisation(tmp_path, {"quantization_config": entry})
    assert found == replace(read, where="config.json: quantization_config")


@pytest.mark.parametrize(
    ("module", "bits"),
    [("model.layers.0.q_proj", 4), ("model.layers.0.down_proj", 8), ("lm_head", 6), ("model.layers.1.down_proj", 8)],
)
def test_the_group_of_a_layer_is_the_one_that_names_it(module: str, bits: int) -> None:
    groups = (WeightGroup(("Linear",), 4), WeightGroup(("re:.*down_proj$",), 8), WeightGroup(("lm_head",), 6))
    found = Quantisation("compressed-tensors", groups=groups).group_of(f"{module}.weight")
    assert found is not None
    assert found.bits == bits


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ("fp8", "expected a mapping with quant_method"),
        ({"speed": "high"}, "has no quant_method, and its keys tell of none: speed"),
        ({"quant_method": "gptq", "bits": "four"}, "bits is 'four'; expected a whole number"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"a": {"targets": ["re:("]}},
            },
            "the targets .* of a config group are damaged",
        ),
        (FP8 | {"weight_block_size": [128]}, r"a block size of \[128\]; expected rows and columns"),
        (FP8 | {"weight_block_size": [0, 4]}, r"a block size of \[0, 4\]"),
        (FP8 | {"weight_block_size": 128}, "a block size of 128"),
        (FP8 | {"weight_block_size": "128"}, "a block size of '128'"),
    ],
)
def test_a_damaged_description(entry: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_quantisation(tmp_path, {"quantization_config": entry})


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"quantize_config.json cannot be read as JSON"):
        read_quantisation(tmp_path, {})


@pytest.mark.parametrize(
    ("tensor", "method"),
    [
        ("q_proj.W_q", "hqq"),
        ("q_proj.weight._data", "quanto"),
        ("q_proj.codebooks", "aqlm"),
    ],
)
def test_tensors_tell_what_a_config_does_not(tensor: str, method: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=f"quantised with {method}.*the tensor {tensor}"):
        check_tensor_names(["q_proj.weight", tensor])


def test_bytes_of_no_known_format_are_refused_when_they_are_loaded(directory: Path, edit: Any) -> None:
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key] = torch.ones(tensors[key].shape, dtype=torch.uint8)

    with pytest.raises(CheckpointError, match=r"expected floating point weights, found torch.uint8.*not read"):
        load(edit(quantise), accelerator="none", policy="static", progress=False)


@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config"])
def test_a_method_is_refused_before_transformers_reads_the_config(where: str, edit_config: Any) -> None:
    entry = {"quant_method": "hqq", "nbits": 4}
    directory = edit_config(**{where: entry if where != "text_config" else {"quantization_config": entry}})
    with pytest.raises(UnsupportedCheckpointError, match=f"quantised with hqq; readable are fp8.*GPTQ.*{where}"):
        load(directory, accelerator="none", policy="static", progress=False)
