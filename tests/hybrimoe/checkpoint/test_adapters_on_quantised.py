"""Adapters on quantised checkpoints: what runs is the dequantised model, merged. Every format of safetensors and GGUF
types, adapters of attention, of single experts and of stacked ones, with a scale; slowly merged here, and by PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from cpu_kernels import ExpertDtype
from hybrimoe.checkpoint import load
from hybrimoe.checkpoint.gguf.tensor_types import TYPES, TensorType
from hybrimoe.checkpoint.inspection import inspect

from ...families.tiny_families import tiny_model
from .formats.test_quantised_checkpoints import write_fp8_blocks, write_mxfp4
from .formats.test_whole_models import SIZES, quantise
from .formats.writers import CASES, Case
from .gguf.models import OVERRIDES, gguf_model
from .gguf.test_tensor_types import blocks
from .models import FLOAT32, OPTIONS, logits
from .test_adapters import ALPHA, RANK, STACKED, Tensors, pair, product, written

SCALE = 0.5
EXACT = FLOAT32 | {"dense_dtype": "float32", "packed_file": False}
REPACKED: dict[ExpertDtype, float] = {"int8": 0.008, "int4": 0.12}
"""How far records of this dtype are from any weights: root mean square of the difference over that of the weights."""
OFTEN = ("Q4_K", "Q6_K", "IQ4_XS")
BLOCK_TYPES = [
    pytest.param(kind, id=kind.name, marks=() if kind.name in OFTEN else pytest.mark.slow)
    for kind in TYPES.values()
    if kind.name.startswith(("IQ", "TQ")) or kind.name.endswith("_K")
]
KINDS = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16")]


NAMES = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


def experts_of(path: str, columns: int, inter: int, names: tuple[str, ...] = NAMES) -> Tensors:
    """Expert 0 and 2 of a layer, each with all its projections. names: of these, the last one down."""
    found: Tensors = {}
    for expert in (0, 2):
        for name in names:
            rows, width = (columns, inter) if name == names[-1] else (inter, columns)
            found |= pair(f"{path}.{expert}.{name}", rows, width)
    return found


def of_mixtral(layer: str = "model.layers.0") -> Tensors:
    """Of a Mixtral of SIZES, by the names of its checkpoints."""
    return experts_of(f"{layer}.block_sparse_moe.experts", SIZES["hidden_size"], SIZES["intermediate_size"], MIXTRAL)


def merge(model: PreTrainedModel, tensors: Tensors, scale: float = 1.0) -> PreTrainedModel:
    """The slow way, in place: linear layers, and single experts of a stacked parameter."""
    modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors}
    with torch.no_grad():
        for module in modules:
            delta = product(tensors, module, scale * ALPHA / RANK)
            stem, found, expert = module.partition(".experts.")
            if not found:
                model.get_submodule(module).weight += delta
                continue
            number, _, name = expert.partition(".")
            experts = model.get_submodule(f"{stem.replace('block_sparse_moe', 'mlp')}.experts")
            inter = experts.down_proj.shape[2]
            gate_up = experts.gate_up_proj[int(number)]
            places = (gate_up[:inter], gate_up[inter:], experts.down_proj[int(number)])
            places[(NAMES if name in NAMES else MIXTRAL).index(name)].add_(delta)
    return model


def assert_merged(
    source: Path, adapter: Path | str, plain: PreTrainedModel, tensors: Tensors, scale: float = 1.0
) -> None:
    """plain: the dequantised model, which is changed."""
    before = logits(plain)
    wanted = logits(merge(plain, tensors, scale))
    assert (wanted - before).abs().max() > 0.05
    torch.testing.assert_close(logits(load(source, adapters=[str(adapter)], **EXACT)), wanted, rtol=1e-4, atol=1e-4)


def assert_records_are_near(
    source: Path, adapter: Path | str, merged: PreTrainedModel, dtype: str, allowed: float
) -> None:
    """Packed records are as near to the merged experts as this dtype comes to any weights."""
    found = load(source, adapters=[str(adapter)], **OPTIONS | {"expert_dtype": dtype, "packed_file": False})
    for key, values in found.hybrimoe.full_state_dict().items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            wanted = merged.get_parameter(key)
            assert (values.float() - wanted).norm() < allowed * wanted.norm(), key


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_format(case: Case, tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    make_model(MixtralConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    quantise(tmp_path / "plain", tmp_path / "quantised", case)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    tensors = of_mixtral() | pair("model.layers.0.self_attn.q_proj", 64, 64)
    adapter = written(tmp_path / "adapter", tensors)
    assert_merged(tmp_path / "quantised", f"{adapter}:{SCALE}", plain, tensors, SCALE)
    choice = inspect(tmp_path / "quantised", [str(adapter)]).choice
    assert choice.dtype == "int8", "codes of the file stand for the sums no longer"
    assert choice.remark is not None
    assert f"{case.name}, with an adapter" in choice.remark


@pytest.mark.parametrize("name", ["gptq-4", "awq", "float8", "mxfp4", "nf4"])
def test_records_are_as_near_to_the_sums_as_their_dtype_allows(
    name: str, tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    make_model(MixtralConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    quantise(tmp_path / "plain", tmp_path / "quantised", CASES[name])
    tensors = of_mixtral()
    adapter = written(tmp_path / "adapter", tensors)
    merged = merge(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32), tensors)
    for dtype, allowed in REPACKED.items():
        assert_records_are_near(tmp_path / "quantised", adapter, merged, dtype, allowed)
    assert_records_are_near(tmp_path / "quantised", adapter, merged, "auto", REPACKED["int8"])


def test_blocks_of_fp8(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    """DeepSeek's: partial blocks, latent attention, a dense layer."""
    directory, plain = write_fp8_blocks(tmp_path / "model", make_model)
    tensors = (
        experts_of("model.layers.1.mlp.experts", 32, 24)
        | pair("model.layers.0.mlp.up_proj", 40, 32)
        | pair("model.layers.1.self_attn.kv_b_proj", 64, 64)
    )
    assert_merged(directory, written(tmp_path / "adapter", tensors), plain, tensors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["mxfp4", "fp8", "gptq-4", "awq"])
def test_as_peft_merges_into_the_dequantised_model(
    which: str, tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    peft = pytest.importorskip("peft")
    if which == "mxfp4":
        source, plain = write_mxfp4(tmp_path / "model", make_model)
        plain = plain.float()
    elif which == "fp8":
        source, plain = write_fp8_blocks(tmp_path / "model", make_model)
    else:
        make_model(MixtralConfig(**SIZES)).save_pretrained(tmp_path / "plain")
        quantise(tmp_path / "plain", source := tmp_path / "model", CASES[which])
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    attention = "o_proj" if which == "fp8" else "q_proj"
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=[attention], **STACKED)
    before, wrapped = logits(plain), peft.get_peft_model(plain, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = logits(wrapped.merge_and_unload())
    assert (wanted - before).abs().max() > 0.05
    found = logits(load(source, adapters=[str(tmp_path / "adapter")], **EXACT))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# GGUF -----------------------------------------------------------------------------------------------------------------


def dequantised(file: Path, family: str) -> PreTrainedModel:
    """The model of the values that a GGUF file stands for."""
    model = tiny_model(family, **OVERRIDES.get(family, {}))
    model.load_state_dict(load(file, **EXACT).hybrimoe.full_state_dict())
    return model


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_of_gguf(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    file = gguf_model("olmoe", tmp_path, kind=kind)
    tensors = experts_of("model.layers.1.mlp.experts", 32, 64) | pair("lm_head", 96, 32)
    adapter = written(tmp_path / "adapter", tensors)
    assert_merged(file, f"{adapter}:{SCALE}", dequantised(file, "olmoe"), tensors, SCALE)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_types_that_only_llama_cpp_can_make(kind: TensorType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K and IQ types, of random blocks: what they stand for is the model that the adapter is added to."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}  # rows are whole blocks
    monkeypatch.setitem(OVERRIDES, "olmoe", OVERRIDES["olmoe"] | wide)
    generator = np.random.default_rng(0)

    def encode(values: np.ndarray, _: gguf.GGMLQuantizationType) -> np.ndarray:
        return blocks(kind, generator, values.shape, limit=0.5)

    file = gguf_model("olmoe", tmp_path, kind=gguf.GGMLQuantizationType(kind.code), encode=encode)
    tensors = experts_of("model.layers.1.mlp.experts", 256, 256) | pair("lm_head", 96, 256)
    adapter = written(tmp_path / "adapter", tensors)
    plain = dequantised(file, "olmoe")
    assert_merged(file, f"{adapter}:{SCALE}", plain, tensors, SCALE)
    assert_records_are_near(file, f"{adapter}:{SCALE}", plain, "auto", REPACKED["int8"])


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("mixtral", "self_attn.q_proj"),
        ("deepseek_v2", "self_attn.kv_b_proj"),
        ("qwen2_moe", "mlp.shared_expert.up_proj"),
    ],
    ids=["rows of heads in another order", "one weight in two tensors", "shared experts"],
)
def test_adapters_fit_weights_that_gguf_lays_out_in_its_own_way(family: str, module: str, tmp_path: Path) -> None:
    file = gguf_model(family, tmp_path)
    plain = dequantised(file, family)
    layer = "model.layers.1"
    columns, inter = (plain.get_submodule(f"{layer}.mlp.experts").down_proj.shape[dim] for dim in (1, 2))
    tensors = pair(f"{layer}.{module}", *plain.get_submodule(f"{layer}.{module}").weight.shape)
    names, block = (MIXTRAL, "block_sparse_moe") if family == "mixtral" else (NAMES, "mlp")
    tensors |= experts_of(f"{layer}.{block}.experts", columns, inter, names)
    assert_merged(file, written(tmp_path / "adapter", tensors), plain, tensors)
