"""Quantised checkpoints are read as the weights they stand for, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, GptOssConfig, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hybrimoe.checkpoint import UnsupportedCheckpointError, load
from hybrimoe.checkpoint.formats.dequantise import Source, dequantised, scale_mxfp4
from hybrimoe.checkpoint.formats.quantisation import Quantisation
from hybrimoe.checkpoint.safetensors_file import open_safetensors
from hybrimoe.errors import CheckpointError

from ..models import FLOAT32, logits

BLOCK = 16
E8M0 = torch.float8_e8m0fnu
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def sources(
    folder: Path, tensors: dict[str, torch.Tensor], quantisation: Quantisation | None = None
) -> dict[str, Source]:
    """What a file with these tensors is read as."""
    save_file(tensors, folder / "model.safetensors")
    return dequantised(open_safetensors(folder / "model.safetensors").tensors, quantisation or Quantisation())


def fp8_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)


def distinct(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scales of which no two neighbours are the same, exact in every dtype."""
    exponents = torch.arange(int(np.prod(shape))).reshape(shape) % 7 - 3
    if dtype == torch.uint8:
        return (exponents + 127).to(torch.uint8)
    return torch.exp2(exponents.float()).to(dtype)


def multiplied(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The slow way: each entry times the scale of its block. scales: one dimension for each of the weight's."""
    values, factors, out = weight.float().numpy(), scales.float().numpy(), np.empty(weight.shape, np.float32)
    for index in np.ndindex(*weight.shape):
        *lead, row, column = index
        place = (*lead, row // block[0], column // block[1])
        out[index] = values[index] * factors[tuple(min(i, n - 1) for i, n in zip(place, factors.shape, strict=True))]
    return torch.from_numpy(out)


def test_mxfp4_blocks_as_transformers_reads_them() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 135, (3, 10, 4), dtype=torch.uint8, generator=generator)
    assert torch.equal(scale_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, E8M0, torch.uint8])
@pytest.mark.parametrize(
    ("weight", "scales", "as_seen", "block"),
    [
        ((24, 40), (), (1, 1), (24, 40)),
        ((24, 40), (1,), (1, 1), (24, 40)),
        ((24, 40), (24,), (24, 1), (1, 40)),
        ((24, 40), (24, 1), (24, 1), (1, 40)),
        ((24, 40), (1, 40), (1, 40), (24, 1)),
        ((72, 112), (5, 7), (5, 7), (16, 16)),
        ((72, 40), (5, 3), (5, 3), (16, 16)),
        ((10, 12), (1, 1), (1, 1), (16, 16)),
        ((10, 40), (1, 3), (1, 3), (16, 16)),
        ((3, 24, 40), (1,), (1, 1, 1), (24, 40)),
        ((3, 24, 40), (3,), (3, 1, 1), (24, 40)),
        ((3, 24, 40), (3, 1), (3, 1, 1), (24, 40)),
        ((3, 24, 40), (3, 1, 1), (3, 1, 1), (24, 40)),
        ((3, 24, 40), (3, 24), (3, 24, 1), (1, 40)),
        ((3, 24, 40), (3, 24, 1), (3, 24, 1), (1, 40)),
        ((3, 24, 40), (3, 1, 40), (3, 1, 40), (24, 1)),
        ((3, 24, 40), (3, 2, 3), (3, 2, 3), (16, 16)),
        ((3, 24, 40), (1, 2, 3), (1, 2, 3), (16, 16)),
        ((1, 24, 40), (1, 2, 3), (1, 2, 3), (16, 16)),
    ],
)
def test_every_entry_gets_the_scale_of_its_block(
    dtype: torch.dtype, weight: tuple[int, ...], scales: tuple[int, ...], as_seen: tuple[int, ...],
    block: tuple[int, int], tmp_path: Path,
) -> None:  # fmt: skip
    values, factors = fp8_weight(*weight), distinct(*scales, dtype=dtype)
    source = sources(tmp_path, {"w": values, "w_scale_inv": factors}, Quantisation("fp8", block=(16, 16)))["w"]
    exact = distinct(*scales).reshape(as_seen)
    expected = multiplied(values, exact.expand(*weight[:-2], *as_seen[-2:]), block)
    assert torch.equal(source.read(), expected)
    for entry in range(weight[0]) if len(weight) == 3 else ():
        assert torch.equal(source.read_slice(entry), expected[entry : entry + 1])


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    lead=st.sampled_from([(), (2,)]),
)
def test_partial_blocks_of_any_size(
    size: tuple[int, int], block: tuple[int, int], lead: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = fp8_weight(*lead, *size)
    factors = distinct(*lead, *(-(-n // length) for n, length in zip(size, block, strict=True)))
    folder = tmp_path_factory.mktemp("blocks")
    source = sources(folder, {"w": values, "w_scale_inv": factors}, Quantisation("fp8", block=block))["w"]
    assert torch.equal(source.read(), multiplied(values, factors, block))


@pytest.mark.parametrize(
    ("weight", "scales"),
    [
        ("m.wq_a.weight", "m.wq_a.weight_scale_inv"),
        ("m.wq_a.weight", "m.wq_a.weight_scale"),
        ("m.wq_a.weight", "m.wq_a.scale"),
        ("m.wq_a.weight", "m.wq_a.scale_inv"),
        ("m.wq_a.weight", "m.wq_a.qscale_weight"),
        ("m.experts.gate_up_proj", "m.experts.gate_up_proj_scale_inv"),
        ("m.experts.w13_weight", "m.experts.w13_weight_scale"),
    ],
)
def test_every_name_of_scales(weight: str, scales: str, tmp_path: Path) -> None:
    values, factors = fp8_weight(24, 40), distinct(2, 3)
    found = sources(tmp_path, {weight: values, scales: factors}, Quantisation("fp8", block=(16, 16)))
    assert torch.equal(found[weight].read(), multiplied(values, factors, (16, 16)))
    assert scales not in found


@pytest.mark.parametrize("byte", [torch.int8, torch.uint8])
@pytest.mark.parametrize("scale", [E8M0, torch.uint8])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_fp4_in_bytes(byte: torch.dtype, scale: torch.dtype, lead: tuple[int, ...], tmp_path: Path) -> None:
    """DeepSeek-V4's experts: two e2m1 values a byte, the low half first, a power of two per 32."""
    generator = torch.Generator().manual_seed(3)
    halves = torch.randint(0, 16, (*lead, 5, 64), generator=generator, dtype=torch.uint8)
    packed = (halves[..., 0::2] | halves[..., 1::2] << 4).view(byte)
    factors = distinct(*lead, 5, 2, dtype=scale)
    source = sources(tmp_path, {"w1.weight": packed, "w1.scale": factors})["w1.weight"]
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    expected = multiplied(table[halves.long()], distinct(*lead, 5, 2), (1, 32))
    assert source.shape == expected.shape
    assert torch.equal(source.read(), expected)
    for entry in range(lead[0]) if lead else ():
        assert torch.equal(source.read_slice(entry), expected[entry : entry + 1])


@pytest.mark.parametrize("scale", [E8M0, torch.uint8])
def test_mxfp8_needs_no_block_size(scale: torch.dtype, tmp_path: Path) -> None:
    values, factors = fp8_weight(5, 96), distinct(5, 3, dtype=scale)
    source = sources(tmp_path, {"w": values, "w_scale": factors}, Quantisation("fp8"))["w"]
    assert torch.equal(source.read(), multiplied(values, distinct(5, 3), (1, 32)))


@pytest.mark.parametrize(
    ("shapes", "block"),
    [
        ([(576, 256)], (128, 128)),
        ([(72, 112), (64, 16), (10, 40)], (16, 16)),
        ([(72, 112), (30, 40)], (16, 8)),
        ([(60, 60)], (20, 20)),
    ],
)
def test_an_unstated_block_size_is_told_from_all_weights_together(
    shapes: list[tuple[int, int]], block: tuple[int, int], tmp_path: Path
) -> None:
    tensors = {}
    for index, (rows, columns) in enumerate(shapes):
        tensors[f"w{index}"] = fp8_weight(rows, columns, seed=index)
        tensors[f"w{index}_scale_inv"] = distinct(-(-rows // block[0]), -(-columns // block[1]))
    found = sources(tmp_path, tensors)
    for index in range(len(shapes)):
        expected = multiplied(tensors[f"w{index}"], tensors[f"w{index}_scale_inv"], block)
        assert torch.equal(found[f"w{index}"].read(), expected)


def test_an_unstated_block_size_of_fp8_is_transformers_default(tmp_path: Path) -> None:
    """200 rows in 2 blocks may be 100 + 100 or 128 + 72; `quant_method: fp8` alone means 128."""
    tensors = {"w": fp8_weight(200, 256), "w_scale_inv": distinct(2, 2)}
    found = sources(tmp_path, tensors, Quantisation("fp8"))["w"].read()
    assert torch.equal(found, multiplied(tensors["w"], tensors["w_scale_inv"], (128, 128)))


def test_a_block_size_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    """200 rows in 2 blocks may be 100 + 100 or 128 + 72."""
    with pytest.raises(CheckpointError, match=r"w \[200, 256\] has a grid of \[2, 2\] scales.*weight_block_size"):
        sources(tmp_path, {"w": fp8_weight(200, 256), "w_scale_inv": distinct(2, 2)})


@pytest.mark.parametrize(
    ("weight", "scales", "match"),
    [
        ((24, 40), (2, 2), r"w_scale \[2, 2\] does not fit w \[24, 40\] in blocks of 16 x 16 \(config.json"),
        ((24, 40), (40,), r"does not fit w \[24, 40\]: expected one scale in all"),
        ((24, 40), (1, 3), "in blocks of 16 x 16"),
        ((3, 24, 40), (2, 3), "expected one scale in all, one an expert"),
        ((3, 24, 40), (24,), "expected one scale in all, one an expert"),
        ((3, 24, 40), (2, 2, 3), "expected one scale in all, one an expert"),
    ],
)
def test_scales_that_do_not_fit(weight: tuple[int, ...], scales: tuple[int, ...], match: str, tmp_path: Path) -> None:
    tensors = {"w": fp8_weight(*weight), "w_scale": distinct(*scales)}
    with pytest.raises(CheckpointError, match=match):
        sources(tmp_path, tensors, Quantisation("fp8", block=(16, 16)))


def test_scales_of_a_dtype_that_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w_scale: scales of torch.int32; readable are float32"):
        sources(tmp_path, {"w": fp8_weight(24, 40), "w_scale": torch.ones(2, 3, dtype=torch.int32)})


def test_bytes_that_are_no_format_are_no_fp4(tmp_path: Path) -> None:
    tensors = {"w.weight": torch.ones(24, 40, dtype=torch.uint8), "w.weight_scale": torch.ones(24, 1)}
    with pytest.raises(UnsupportedCheckpointError, match=r"w.weight is torch.uint8.*only fp4"):
        sources(tmp_path, tensors)


def write_mxfp4(folder: Path, make_model: Callable[..., PreTrainedModel]) -> tuple[Path, PreTrainedModel]:
    """A gpt-oss whose experts are in MXFP4, in `folder`, and the bfloat16 model of the same values."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_local_experts": 4,
        "vocab_size": 64,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = GptOssConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_parameters=rope)
    plain = make_model(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    plain.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, parameter in plain.model.layers[0].mlp.experts.named_parameters():
        if parameter.dim() != 3:
            continue
        experts, columns, rows = parameter.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            parameter.copy_(convert_moe_packed_tensors(blocks, scales))
        del tensors[f"model.layers.0.mlp.experts.{name}"]
        tensors[f"model.layers.0.mlp.experts.{name}_blocks"] = blocks
        tensors[f"model.layers.0.mlp.experts.{name}_scales"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(folder)
    return folder, plain


def test_a_gpt_oss_checkpoint_in_mxfp4(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    directory, plain = write_mxfp4(tmp_path, make_model)
    model = load(directory, **FLOAT32)
    model.hybrimoe.restore()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.fixture
def fp8(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> tuple[Path, PreTrainedModel]:
    """What `write_fp8_blocks` writes."""
    return write_fp8_blocks(tmp_path, make_model)


def write_fp8_blocks(folder: Path, make_model: Callable[..., PreTrainedModel]) -> tuple[Path, PreTrainedModel]:
    """A DeepSeek-V3 in `folder`, every projection in fp8 blocks of BLOCK x BLOCK with scales that all differ, and the
    same weights as a plain model. Its latent projections end in partial blocks, as 576 rows do in blocks of 128."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 64}
    dims = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "vocab_size": 64}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    plain = make_model(DeepseekV3Config(**sizes, **heads, **dims, **experts))
    plain.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for key in [key for key in tensors if "_proj" in key and key.endswith(".weight")]:
        rows, columns = tensors[key].shape
        scale = 0.05 + torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=generator)
        expanded = multiplied(torch.ones(rows, columns), scale, (BLOCK, BLOCK))
        weight = (tensors[key] / expanded).to(torch.float8_e4m3fn)
        tensors[key] = weight.float() * expanded
        tensors[f"{key}_scale_inv"] = scale
        tensors[f"{key}.fp8"] = weight
    stored = {key: tensors.get(f"{key}.fp8", value) for key, value in tensors.items() if not key.endswith(".fp8")}
    plain.load_state_dict(fused(plain, tensors))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    state_block(folder, [BLOCK, BLOCK])
    return folder, plain


def fused(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per-expert tensors as the parameters of the fused experts of `model`."""
    state = {key: tensors[key] for key in model.state_dict() if key in tensors}
    for key in model.state_dict().keys() - state.keys():
        stem, _, name = key.rpartition(".")
        parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
        state[key] = torch.stack(
            [torch.cat([tensors[f"{stem}.{expert}.{part}.weight"] for part in parts]) for expert in range(4)]
        )
    return state


def state_block(directory: Path, block: list[int] | None, **entries: Any) -> None:
    file = directory / "config.json"
    entry = {"quant_method": "fp8", "weight_block_size": block, **entries}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": entry}))


def test_a_deepseek_checkpoint_in_fp8(fp8: tuple[Path, PreTrainedModel]) -> None:
    directory, plain = fp8
    torch.testing.assert_close(logits(load(directory, **FLOAT32)), logits(plain), rtol=1e-5, atol=1e-5)


def test_a_deepseek_checkpoint_in_fp8_whose_config_says_nothing(fp8: tuple[Path, PreTrainedModel]) -> None:
    directory, plain = fp8
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(load(directory, **FLOAT32)), logits(plain), rtol=1e-5, atol=1e-5)


def test_a_deepseek_checkpoint_in_fp8_with_another_block_size_in_its_config(fp8: tuple[Path, PreTrainedModel]) -> None:
    directory, _ = fp8
    state_block(directory, [32, 16])
    with pytest.raises(CheckpointError, match=r"in blocks of 32 x 16 \(config.json: quantization_config\)"):
        load(directory, **FLOAT32)


def test_fp8_without_its_scales(fp8: tuple[Path, PreTrainedModel]) -> None:
    directory, _ = fp8
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts.2.up_proj.weight is quantised and its scales are missing"):
        load(directory, **FLOAT32)
