"""Adapters merged while weights are read: the logits of a model that was merged slowly, in every layout that PEFT has
written; packs never mixed; what does not fit refused by name before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import hybrimoe
from hybrimoe.checkpoint import UnsupportedCheckpointError, convert, load
from hybrimoe.checkpoint.inspection import inspect
from hybrimoe.cli.chat import identity
from hybrimoe.cli.shared.opening import OpenModel
from hybrimoe.errors import CheckpointError, ConfigError, HybriMoEError, ModelError

from .conftest import SMALL
from .models import DENSE_OPTIONS, FLOAT32, OPTIONS, files_of, logits

RANK, ALPHA, STD = 4, 6, 0.3
LAYER = "model.layers.1"
Q = f"{LAYER}.self_attn.q_proj"
HIDDEN, INTER, N_EXPERTS, VOCABULARY = (
    SMALL[name] for name in ("hidden_size", "intermediate_size", "num_local_experts", "vocab_size")
)

Tensors = dict[str, torch.Tensor]
Edit = Callable[[PreTrainedModel, Tensors], None]


def drawn(*shape: int) -> torch.Tensor:
    return STD * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pair(module: str, rows: int, columns: int, rank: int = RANK) -> Tensors:
    """The matrices of a module, as PEFT names them."""
    key = f"base_model.model.{module}.lora_"
    return {f"{key}A.weight": drawn(rank, columns), f"{key}B.weight": drawn(rows, rank)}


def written(folder: Path, tensors: Tensors, **settings: Any) -> Path:
    """An adapter folder. settings: go over those of plain LoRA."""
    folder.mkdir(exist_ok=True)
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def product(tensors: Tensors, module: str, scale: float = ALPHA / RANK) -> torch.Tensor:
    key = f"base_model.model.{module}.lora_"
    return scale * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]


def expected(model: PreTrainedModel, edit: Edit, tensors: Tensors) -> torch.Tensor:
    """Logits of the model after a slow merge."""
    with torch.no_grad():
        edit(model, tensors)
    return logits(model)


def assert_merged(directory: Path, adapter: Path | str, wanted: torch.Tensor, **options: Any) -> None:
    found = logits(load(directory, adapters=[str(adapter)], **FLOAT32 | {"packed_file": False} | options))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# What is adapted ------------------------------------------------------------------------------------------------------


def around_experts() -> Tensors:
    """Attention, router (by its older name), embedding and output layer."""
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    return (
        pair(f"{LAYER}.self_attn.q_proj", HIDDEN, HIDDEN)
        | pair(f"{LAYER}.block_sparse_moe.gate", N_EXPERTS, HIDDEN)
        | pair("lm_head", VOCABULARY, HIDDEN)
        | {f"{embedding}A": drawn(RANK, VOCABULARY), f"{embedding}B": drawn(HIDDEN, RANK)}
    )


def merge_around(model: PreTrainedModel, tensors: Tensors, scale: float = ALPHA / RANK) -> None:
    layer = model.model.layers[1]
    layer.self_attn.q_proj.weight += product(tensors, f"{LAYER}.self_attn.q_proj", scale)
    layer.mlp.gate.weight += product(tensors, f"{LAYER}.block_sparse_moe.gate", scale)
    model.lm_head.weight += product(tensors, "lm_head", scale)
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{name}"] for name in "AB")
    model.model.embed_tokens.weight += scale * (b @ a).T


def single_experts(which: tuple[str, ...] = ("w1", "w2", "w3")) -> Tensors:
    """Experts as modules of their own, of which expert 2 is left alone."""
    found: Tensors = {}
    for expert in (0, 1, 3):
        for name in which:
            rows, columns = (HIDDEN, INTER) if name == "w2" else (INTER, HIDDEN)
            found |= pair(f"{LAYER}.block_sparse_moe.experts.{expert}.{name}", rows, columns)
    return found


def merge_single(model: PreTrainedModel, tensors: Tensors) -> None:
    experts = model.model.layers[1].mlp.experts
    for expert in (0, 1, 3):
        for name, target in (
            ("w1", experts.gate_up_proj[expert, :INTER]),
            ("w3", experts.gate_up_proj[expert, INTER:]),
            ("w2", experts.down_proj[expert]),
        ):
            module = f"{LAYER}.block_sparse_moe.experts.{expert}.{name}"
            if f"base_model.model.{module}.lora_A.weight" in tensors:
                target += product(tensors, module)


def stacked_pair(module: str, rows: int, columns: int, n_experts: int = N_EXPERTS) -> Tensors:
    return pair(module, rows, columns, RANK * n_experts)


STACKED = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def stacked_experts(*, old: bool = False) -> Tensors:
    """Both stacked parameters of a module: the first within the second. old: as PEFT before 0.19.1 took them."""
    gate_up, down = (2 * INTER, HIDDEN), (HIDDEN, INTER)
    path = f"{LAYER}.mlp.experts"
    return stacked_pair(f"{path}.base_layer", *(gate_up[::-1] if old else gate_up)) | stacked_pair(
        path, *(down[::-1] if old else down)
    )


def merge_stacked(model: PreTrainedModel, tensors: Tensors, *, transposed: bool = False) -> None:
    experts = model.model.layers[1].mlp.experts
    path = f"base_model.model.{LAYER}.mlp.experts"
    for name, parameter in ((f"{path}.base_layer", experts.gate_up_proj), (path, experts.down_proj)):
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        for expert in range(len(parameter)):
            rows = a[expert * RANK : (expert + 1) * RANK]
            columns = b[:, [rank * len(parameter) + expert for rank in range(RANK)]]
            delta = ALPHA / RANK * columns @ rows
            parameter[expert] += delta.T if transposed else delta


@pytest.mark.parametrize(
    ("tensors", "edit", "settings"),
    [
        pytest.param(around_experts(), merge_around, {}, id="around the experts"),
        pytest.param(
            around_experts(), lambda m, t: merge_around(m, t, ALPHA / RANK**0.5), {"use_rslora": True}, id="rslora"
        ),
        pytest.param(single_experts(), merge_single, {}, id="single experts"),
        pytest.param(single_experts(("w1",)), merge_single, {}, id="gates of single experts"),
        pytest.param(stacked_experts(), merge_stacked, STACKED, id="stacked experts"),
        pytest.param(
            stacked_experts(old=True), lambda m, t: merge_stacked(m, t, transposed=True),
            STACKED | {"peft_version": "0.17.1"}, id="stacked experts of older releases",
        ),
    ],
)  # fmt: skip
def test_the_merged_model(
    tensors: Tensors, edit: Edit, settings: Any, directory: Path, mixtral: PreTrainedModel, tmp_path: Path
) -> None:
    adapter = written(tmp_path / "adapter", tensors, **settings)
    plain = logits(mixtral)
    wanted = expected(mixtral, edit, tensors)
    assert (wanted - plain).abs().max() > 0.05
    assert_merged(directory, adapter, wanted)


def test_ranks_and_alphas_of_single_modules(directory: Path, mixtral: PreTrainedModel, tmp_path: Path) -> None:
    q, v = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj"
    tensors = pair(q, HIDDEN, HIDDEN, 2) | pair(v, HIDDEN // 2, HIDDEN)
    adapter = written(
        tmp_path / "adapter", tensors, rank_pattern={"self_attn.q_proj": 2}, alpha_pattern={r".*\.1\..*v_proj": 20}
    )

    def edit(model: PreTrainedModel, tensors: Tensors) -> None:
        attention = model.model.layers[1].self_attn
        attention.q_proj.weight += product(tensors, q, ALPHA / 2)
        attention.v_proj.weight += product(tensors, v, 20 / RANK)

    assert_merged(directory, adapter, expected(mixtral, edit, tensors))


def test_several_adapters_with_scales(directory: Path, mixtral: PreTrainedModel, tmp_path: Path) -> None:
    first, second = around_experts(), single_experts()
    names = [f"{written(tmp_path / 'first', first)}:0.5", str(written(tmp_path / "second", second))]

    def edit(model: PreTrainedModel, tensors: Tensors) -> None:
        merge_around(model, first, 0.5 * ALPHA / RANK)
        merge_single(model, second)

    wanted = expected(mixtral, edit, {})
    found = logits(load(directory, adapters=names, packed_file=False, **FLOAT32))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_dora_and_weights_that_are_replaced(directory: Path, mixtral: PreTrainedModel, tmp_path: Path) -> None:
    q = f"{LAYER}.self_attn.q_proj"
    tensors = pair(q, HIDDEN, HIDDEN) | {
        f"base_model.model.{q}.lora_magnitude_vector": 1 + drawn(HIDDEN).abs(),
        "base_model.model.model.norm.weight": 1 + drawn(HIDDEN),
        f"base_model.model.{LAYER}.mlp.gate.weight": drawn(N_EXPERTS, HIDDEN),
    }
    adapter = written(tmp_path / "adapter", tensors, use_dora=True, modules_to_save=["norm", "gate"])

    def edit(model: PreTrainedModel, tensors: Tensors) -> None:
        weight = model.model.layers[1].self_attn.q_proj.weight
        merged = weight + product(tensors, q)
        lengths = tensors[f"base_model.model.{q}.lora_magnitude_vector"]
        weight.copy_(merged * (lengths / merged.norm(dim=1))[:, None])
        model.model.norm.weight.copy_(tensors["base_model.model.model.norm.weight"])
        model.model.layers[1].mlp.gate.weight.copy_(tensors[f"base_model.model.{LAYER}.mlp.gate.weight"])

    assert_merged(directory, adapter, expected(mixtral, edit, tensors))


def test_transposed_experts_biases_and_shared_experts(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    sizes = {name: value for name, value in SMALL.items() if name != "num_local_experts"}
    gpt_oss = make_model(GptOssConfig(**SMALL, head_dim=8, sliding_window=16))
    gpt_oss.save_pretrained(tmp_path / "gpt_oss")
    path = f"{LAYER}.mlp.experts"
    tensors = stacked_pair(f"{path}.base_layer", 2 * INTER, HIDDEN) | stacked_pair(path, HIDDEN, INTER)
    tensors["base_model.model." + f"{LAYER}.self_attn.q_proj.base_layer.bias"] = drawn(HIDDEN)
    adapter = written(tmp_path / "first", tensors, bias="lora_only", **STACKED)

    def edit(model: PreTrainedModel, tensors: Tensors) -> None:
        merge_stacked(model, tensors, transposed=True)
        model.model.layers[1].self_attn.q_proj.bias.copy_(drawn(HIDDEN))

    assert_merged(tmp_path / "gpt_oss", adapter, expected(gpt_oss, edit, tensors))

    qwen = make_model(
        Qwen2MoeConfig(**sizes, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24,
                       mlp_only_layers=[0])
    )  # fmt: skip
    qwen.save_pretrained(tmp_path / "qwen")
    shared, dense = f"{LAYER}.mlp.shared_expert.up_proj", "model.layers.0.mlp.down_proj"
    tensors = pair(shared, 24, HIDDEN) | pair(dense, HIDDEN, INTER)

    def edit_qwen(model: PreTrainedModel, tensors: Tensors) -> None:
        model.model.layers[1].mlp.shared_expert.up_proj.weight += product(tensors, shared)
        model.model.layers[0].mlp.down_proj.weight += product(tensors, dense)

    assert_merged(tmp_path / "qwen", written(tmp_path / "second", tensors), expected(qwen, edit_qwen, tensors))


# Packs ----------------------------------------------------------------------------------------------------------------


def test_packs_with_and_without_an_adapter_are_never_mixed(directory: Path, tmp_path: Path) -> None:
    experts = written(tmp_path / "experts", single_experts())
    attention = written(tmp_path / "attention", pair(f"{LAYER}.self_attn.q_proj", HIDDEN, HIDDEN))
    variants: list[dict[str, Any]] = [
        {}, {"adapters": [str(experts)]}, {"adapters": [f"{experts}:0.5"]}, {"adapters": [str(attention)]},
    ]  # fmt: skip
    fresh = [logits(load(directory, packed_file=False, **DENSE_OPTIONS, **variant)) for variant in variants]
    for _ in range(2):  # the second time all are found packed
        for variant, wanted in zip(variants, fresh, strict=True):
            calls = set[str]()
            options = DENSE_OPTIONS | {"progress": lambda *call, seen=calls: seen.add(call[2])}
            assert torch.equal(logits(load(directory, **options, **variant)), wanted)
    assert not [what for what in calls if "packing" in what]
    assert len(files_of("experts", directory)) == 3, "an adapter of the attention leaves the experts' pack as it is"
    assert len(files_of("dense", directory)) == 2
    written(tmp_path / "experts", {key: 2 * value for key, value in single_experts().items()})
    assert not torch.equal(logits(load(directory, **DENSE_OPTIONS, adapters=str(experts))), fresh[1])


def test_saved_conversations_belong_to_the_adapters_that_they_were_held_with(directory: Path, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", pair(Q, HIDDEN, HIDDEN))

    def of(**options: Any) -> str:
        config = hybrimoe.load_config({"model": str(directory)}, **options)
        return identity(cast("OpenModel", SimpleNamespace(config=config, generator=SimpleNamespace(tokenizer=None))))

    before = of(adapters=[str(adapter)])
    assert len({of(), before, of(adapters=[f"{adapter}:0.5"])}) == 3
    assert of(adapters=[str(adapter)]) == before
    written(adapter, pair(Q, HIDDEN, HIDDEN) | pair("lm_head", VOCABULARY, HIDDEN))
    assert of(adapters=[str(adapter)]) != before


def test_a_converted_model_is_the_merged_one(directory: Path, mixtral: PreTrainedModel, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", stacked_experts() | around_experts(), **STACKED)

    def edit(model: PreTrainedModel, tensors: Tensors) -> None:
        merge_stacked(model, stacked_experts())
        merge_around(model, around_experts())

    wanted = expected(mixtral, edit, {})
    convert(directory, tmp_path / "pack", adapters=[str(adapter)], expert_dtype="float32", progress=False)
    torch.testing.assert_close(logits(load(tmp_path / "pack", **FLOAT32)), wanted, rtol=1e-4, atol=1e-4)

    convert(directory, tmp_path / "plain", expert_dtype="float32", progress=False)
    assert_merged(tmp_path / "plain", adapter, wanted)  # records are dequantised, merged and packed again


def test_experts_that_rules_leave_alone_are_merged_too(
    directory: Path, mixtral: PreTrainedModel, tmp_path: Path
) -> None:
    adapter = written(tmp_path / "adapter", single_experts())
    rules = [{"match": {"name": r"layers\.0\..*experts$"}, "replace": {"op": "hybrid_experts"}}]
    assert_merged(directory, adapter, expected(mixtral, merge_single, single_experts()), rules=rules)


def test_inspect_says_what_an_adapter_changes(directory: Path, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", single_experts() | around_experts(), rank_pattern={"nothing": 8})
    (summary,) = inspect(directory, [f"{adapter}:0.5"]).adapters
    assert (summary.n_experts, summary.n_others, summary.ranks, summary.scale) == (2, 4, (4, 8), 0.5)


# Bad input ------------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, Tensors, dict[str, Any], type[HybriMoEError], str]] = [
    ("another method", {}, {"peft_type": "IA3"}, UnsupportedCheckpointError, "IA3; only LoRA is merged"),
    ("no weights", {}, {}, CheckpointError, "has no weights"),
    ("a variant", pair(Q, HIDDEN, HIDDEN), {"use_qalora": True}, UnsupportedCheckpointError, "use_qalora is set"),
    (
        "a changed base", pair(Q, HIDDEN, HIDDEN), {"init_lora_weights": "pissa_niter_4"}, UnsupportedCheckpointError,
        "init_lora_weights is pissa_niter_4, for which PEFT changes",
    ),
    ("no rank", pair(Q, HIDDEN, HIDDEN), {"r": 0}, CheckpointError, "expected ranks of 1 or more"),
    ("another rank", pair(Q, HIDDEN, HIDDEN), {"r": 8}, CheckpointError, "json gives it rank 8"),
    ("another shape", pair(Q, HIDDEN, 40), {}, CheckpointError, r"for a weight \[32, 40\], .* is \[32, 32\].*org/base"),
    (
        "another model", pair("transformer.h.0.attn.c_attn", HIDDEN, HIDDEN), {}, CheckpointError,
        r"\(mixtral\) has no transformer\.h\.0\.attn\.c_attn; the adapter was made for org/base",
    ),
    (
        "too many experts", pair(f"{LAYER}.block_sparse_moe.experts.4.w1", INTER, HIDDEN), {}, CheckpointError,
        "changes expert 4 of model.layers.1.mlp.experts.gate_up_proj, which has 4 experts",
    ),
    (
        "other experts", stacked_pair(f"{LAYER}.mlp.experts", HIDDEN, INTER, 8),
        {"target_parameters": ["experts.down_proj"]}, CheckpointError, "rank 4 x 4 experts",
    ),
    (
        "experts of no name", stacked_pair(f"{LAYER}.mlp.experts", HIDDEN, INTER), {}, CheckpointError,
        r"target_parameters of adapter_config\.json \(empty\)",
    ),
    (
        "half a pair", {f"base_model.model.{Q}.lora_A.weight": drawn(RANK, HIDDEN)}, {}, CheckpointError,
        "q_proj lacks lora_B",
    ),
    (
        "an empty part", pair(Q, HIDDEN, HIDDEN) | {f"base_model.model.{Q}.lora_A.weight": torch.zeros(0)}, {},
        CheckpointError, "sharded training",
    ),
    (
        "not finite", {key: value / 0 for key, value in pair(Q, HIDDEN, HIDDEN).items()}, {}, CheckpointError,
        "NaN or infinite; the adapter is damaged",
    ),
    (
        "DoRA of experts",
        single_experts(("w1",))
        | {f"base_model.model.{LAYER}.block_sparse_moe.experts.0.w1.lora_magnitude_vector": drawn(INTER)},
        {"use_dora": True}, UnsupportedCheckpointError, r"DoRA \(use_dora\) of .*experts\.0\.w1 is not merged",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "settings", "error", "message"), [case[1:] for case in BAD], ids=lambda _: "")
def test_what_does_not_fit_is_refused_by_name(
    tensors: Tensors, settings: Any, error: type[HybriMoEError], message: str, directory: Path, tmp_path: Path
) -> None:
    adapter = written(tmp_path / "adapter", tensors, **settings)
    with pytest.raises(error, match=message):
        load(directory, adapters=[str(adapter)], **OPTIONS)


def test_files_that_are_cut_damaged_or_missing(directory: Path, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", pair(Q, HIDDEN, HIDDEN))
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole = weights.read_bytes()
    for n_bytes in (0, 7, 40, len(whole) - 1):
        weights.write_bytes(whole[:n_bytes])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load(directory, adapters=[str(adapter)], **OPTIONS)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has adapter_model\.bin but no adapter_model\.safetensors"):
        load(directory, adapters=[str(adapter)], **OPTIONS)
    config.write_text('{"peft_type": "LORA", "r": "four"}')
    weights.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is damaged"):
        load(directory, adapters=[str(adapter)], **OPTIONS)
    for text in ("{", "[]", '{"r": 4}'):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=r"cannot be read as JSON|no configuration of an adapter"):
            load(directory, adapters=[str(adapter)], **OPTIONS)
    config.unlink()
    with pytest.raises(ModelError, match="is no adapter: it has no adapter_config"):
        load(directory, adapters=[str(adapter)], **OPTIONS)
    for name in ("", f"{adapter}:0", f"{adapter}:inf"):
        with pytest.raises(ConfigError, match="DIR:SCALE"):
            load(directory, adapters=[name], **OPTIONS)


def test_what_would_change_more_than_it_says_is_refused(
    edit_config: Callable[..., Path], mixtral: PreTrainedModel, tmp_path: Path
) -> None:
    norm = {"base_model.model.model.norm.weight": drawn(HIDDEN)}
    first, second = written(tmp_path / "first", norm), written(tmp_path / "second", norm)
    directory = edit_config(tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"replaces model\.norm\.weight, which another adapter changes"):
        load(directory, adapters=[str(first), str(second)], **OPTIONS)
    with pytest.raises(CheckpointError, match=r"scale of 0\.5 was given, and the adapter replaces model\.norm\.weight"):
        load(directory, adapters=f"{first}:0.5", **OPTIONS)
    head = written(tmp_path / "head", pair("lm_head", VOCABULARY, HIDDEN))
    tensors = load_file(edit_config(tie_word_embeddings=True) / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedCheckpointError, match=r"lm_head\.weight, which input embeddings and output layer"):
        load(directory, adapters=[str(head)], **OPTIONS)
    with pytest.raises(ConfigError, match=r"merged by hybrimoe\.load"):
        hybrimoe.inject(mixtral, adapters=[str(head)], accelerator="none")


# Against PEFT ---------------------------------------------------------------------------------------------------------

SIZES = {name: value for name, value in SMALL.items() if name != "num_local_experts"}
FAMILIES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SMALL),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16),
    "gpt_oss": GptOssConfig(**SMALL, head_dim=8, sliding_window=16),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "o_proj", "lm_head"], "use_dora": True, "modules_to_save": ["norm"]},
        {"target_modules": ["k_proj"], **STACKED, "use_rslora": True, "rank_pattern": {"mlp.experts.down_proj": 2}},
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ],
    ids=["dense with DoRA", "both of the experts", "one of the experts"],
)
def test_as_peft_merges(
    settings: dict[str, Any], family: str, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = make_model(FAMILIES[family])
    model.save_pretrained(tmp_path / "model")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                weight.copy_(STD * torch.randn(weight.shape, generator=generator))
            elif weight.requires_grad:
                weight.mul_(1.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = logits(wrapped.merge_and_unload())
    assert (wanted - logits(make_model(FAMILIES[family]))).abs().max() > 0.05
    assert_merged(tmp_path / "model", tmp_path / "adapter", wanted)
