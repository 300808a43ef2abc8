"""What is wrong with a model directory is said, with names, before anything is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig, LlamaConfig, PreTrainedModel

from hybrimoe.checkpoint import UnsupportedCheckpointError, load, load_tokenizer
from hybrimoe.checkpoint.errors import LeftOutWarning, TiedEmbeddingsWarning
from hybrimoe.demo import demo_model_path
from hybrimoe.errors import BudgetError, CheckpointError, DeviceError, HybriMoEError, ModelError

from .conftest import SMALL
from .models import OPTIONS

Edit = Callable[[Callable[[dict[str, torch.Tensor]], Any]], Path]
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def fails(error: type[HybriMoEError], match: str, directory: Path, **options: Any) -> None:
    """Loading must fail in this way, and leave no packed file behind."""
    with pytest.raises(error, match=match):
        load(directory, accelerator="none", expert_dtype="float32", policy="static", progress=False, **options)
    if directory.is_dir():
        assert not list(directory.glob("*.hybrimoe"))
        assert not list(directory.glob("*.partial"))


def test_expert_keys_are_what_this_file_says(edit: Edit) -> None:
    edit(lambda tensors: tensors[EXPERT])


def test_no_directory(tmp_path: Path) -> None:
    fails(ModelError, "no model directory", tmp_path / "a" / "b" / "c")


def test_a_file_instead_of_a_directory(directory: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        fails(ModelError, f"is a file; give the model's folder: {directory}", directory / name)
    lone = directory.parent / "notes.txt"
    lone.write_text("text")
    fails(ModelError, "is a file; expected a directory", lone)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in this system's folders")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    fails(ModelError, "is a file; expected a directory", tmp_path / "model.gguf")


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(ModelError, "is no model directory: it has no config.json", tmp_path / "empty")


def test_a_folder_of_the_hubs_cache(directory: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0a1b"
    snapshot.parent.mkdir(parents=True)
    directory.rename(snapshot)
    fails(ModelError, f"has no config.json; it is a folder of the hub's cache: give {snapshot}", snapshot.parents[1])


def test_a_config_that_is_no_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    fails(ModelError, "cannot be read as JSON", directory)


@pytest.mark.parametrize(("code", "words"), [(errno.EACCES, "may not be read by this user"), (errno.EIO, "cannot be")])
def test_a_config_that_the_system_does_not_give(
    directory: Path, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: nothing is withheld from root, as whom tests may run."""
    read = Path.read_bytes

    def refuse(file: Path) -> bytes:
        if file.name == "config.json":
            raise OSError(code, os.strerror(code), str(file))
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ModelError, match=words) as caught:
        load(directory)
    assert "JSON" not in str(caught.value)


def test_a_config_without_a_model_type(directory: Path) -> None:
    (directory / "config.json").write_text("{}")
    fails(ModelError, "no model_type", directory)


def test_an_unknown_model_type(edit_config: Callable[..., Path]) -> None:
    fails(ModelError, "nosuchmodel", edit_config(model_type="nosuchmodel"))


def test_a_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(**{key: value for key, value in SMALL.items() if "experts" not in key})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    fails(ModelError, "is a dense model", tmp_path / "dense")


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    fails(CheckpointError, "has no weights: expected model.safetensors", directory)


def test_weights_in_another_format(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    fails(
        UnsupportedCheckpointError,
        r"pytorch_model\.bin.*convert it once, with transformers: .*save_pretrained",
        directory,
    )


@pytest.mark.parametrize("ending", [".incomplete", ".part", ".crdownload", ".aria2"])
def test_a_download_that_has_not_ended(ending: str, directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / f"model.safetensors{ending}")
    fails(CheckpointError, f"no weights yet: model.safetensors{ending} is not fetched to its end", directory)


def test_a_truncated_file(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fails(CheckpointError, "truncated or damaged.*its header promises", directory)


def test_a_file_cut_inside_its_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    fails(CheckpointError, "its header is cut off", directory)


def test_a_file_that_is_no_safetensors(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"no weights at all" * 99)
    fails(CheckpointError, "truncated or damaged", directory)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4321\n"
PAGE = b"<!DOCTYPE html><html>not found</html>" * 99


@pytest.mark.parametrize(
    ("contents", "wanted"),
    [(POINTER, "is a pointer of Git LFS.*run `git lfs pull` in"), (PAGE, "holds a web page, not the file itself")],
    ids=["a pointer", "a page"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_what_lies_in_the_place_of_a_file(name: str, contents: bytes, wanted: str, directory: Path) -> None:
    if "index" in name:
        (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(contents)
    with pytest.raises((CheckpointError, ModelError), match=f"{name} {wanted}"):
        load_tokenizer(directory) if name == "tokenizer.json" else load(directory, **OPTIONS)


@pytest.mark.parametrize("name", ["model.gguf", "model"])
def test_a_pointer_in_the_place_of_a_gguf_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises((CheckpointError, ModelError), match=f"{name} is a pointer of Git LFS"):
        load(tmp_path / name, **OPTIONS)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_to_what_is_not_there(name: str, directory: Path) -> None:
    (directory / name).unlink()
    (directory / name).symlink_to(directory.parent / "blobs" / "0a1b")
    with pytest.raises(
        (CheckpointError, ModelError), match=rf"{name} is a link to .*0a1b, which is not there; fetch it"
    ):
        load(directory, **OPTIONS)


@pytest.mark.parametrize("size", [1 << 31, 1 << 63, 1e300])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "num_local_experts", "sliding_window"])
def test_sizes_beyond_all_measure_are_refused_before_anything_is_built(
    name: str, size: float, edit_config: Callable[..., Path]
) -> None:
    fails(ModelError, f"{name} in config.json is .*; expected [0-9]+ at most", edit_config(**{name: size}))


def test_a_text_config_that_is_none(edit_config: Callable[..., Path]) -> None:
    fails(ModelError, "text_config in config.json is 'x'; expected an object", edit_config(text_config="x"))


def test_a_link_in_the_place_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("elsewhere")
    fails(ModelError, "model is a link to elsewhere, which is not there", tmp_path / "model")


@pytest.mark.parametrize("entry", ["rope_parameters", "rope_scaling"])
def test_positions_of_a_type_that_transformers_does_not_know(entry: str, edit_config: Callable[..., Path]) -> None:
    directory = edit_config(**{entry: {"rope_type": "warp", "factor": 2.0, "rope_theta": 1e4}})
    fails(ModelError, r"positions of the type 'warp' \(rope_type\).*it knows default, .*yarn: correct", directory)


def test_a_missing_shard(tmp_path: Path, mixtral: PreTrainedModel) -> None:
    mixtral.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    shards[1].unlink()
    fails(CheckpointError, f"lacks {shards[1].name}.*fetch the missing shards", tmp_path / "sharded")


def test_an_index_that_names_what_a_shard_lacks(tmp_path: Path, mixtral: PreTrainedModel) -> None:
    directory = tmp_path / "sharded"
    mixtral.save_pretrained(directory, max_shard_size="40KB")
    shards = sorted(directory.glob("*.safetensors"))
    shutil.copy(shards[0], shards[1])
    fails(CheckpointError, f"not found in {shards[1].name}", directory)


def test_a_damaged_index(tmp_path: Path, mixtral: PreTrainedModel) -> None:
    mixtral.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}}))
    fails(CheckpointError, "cannot be read as a safetensors index", tmp_path / "sharded")


def test_a_missing_expert(edit: Edit) -> None:
    fails(CheckpointError, "asks for 4 experts.*3 like.*w1", edit(lambda tensors: tensors.pop(EXPERT)))


def test_a_missing_projection_of_all_experts(edit: Edit) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".layers.0." in key and key.endswith("w3.weight")]:
            del tensors[key]

    fails(CheckpointError, r"layers.0.mlp.experts.gate_up_proj.*no tensors like .*w3", edit(drop))


def test_all_experts_of_a_layer_missing(edit: Edit) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".layers.1." in key and ".experts." in key]:
            del tensors[key]

    fails(CheckpointError, "lacks the experts.*model.layers.1.mlp.experts", edit(drop))


def test_a_missing_dense_weight(edit: Edit) -> None:
    fails(CheckpointError, "lacks model.norm.weight", edit(lambda tensors: tensors.pop("model.norm.weight")))


def test_more_experts_than_the_config_says(edit_config: Callable[..., Path]) -> None:
    fails(CheckpointError, "asks for 3 experts, the checkpoint has 4", edit_config(num_local_experts=3))


def test_an_expert_of_another_shape(edit: Edit) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT] = tensors[EXPERT][:40].clone()

    fails(
        CheckpointError,
        r"expert 2: config.json asks for shape \[96, 32\], the checkpoint gives \[88, 32\]",
        edit(shrink),
    )


def test_a_config_of_other_sizes(edit_config: Callable[..., Path]) -> None:
    fails(CheckpointError, "config.json asks for shape", edit_config(intermediate_size=64))


def test_a_dense_weight_of_another_shape(edit: Edit) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(31)

    fails(CheckpointError, r"model.norm.weight: config.json asks for shape \[32\]", edit(shrink))


def test_whole_numbers_where_weights_belong(edit: Edit) -> None:
    def round_all(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key] = tensors[key].to(torch.int8)

    fails(CheckpointError, "expected floating point weights, found torch.int8", edit(round_all))


def test_whole_numbers_in_a_dense_weight(edit: Edit) -> None:
    def round_norm(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)

    fails(
        CheckpointError,
        "model.norm.weight: the model has torch.float32, the checkpoint gives torch.int32",
        edit(round_norm),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [EXPERT, "model.layers.0.self_attn.q_proj.weight"])
def test_values_that_are_not_finite(key: str, value: float, edit: Edit) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][1, 2] = value

    fails(CheckpointError, f"(?s){key.replace('.', '.')}.*damaged|damaged.*{key}", edit(spoil))


def test_a_weight_that_the_model_does_not_know(edit: Edit) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.adapter.weight"] = torch.ones(3)

    directory = edit(add)
    fails(CheckpointError, "does not know: model.layers.0.adapter.weight", directory)
    load(directory, accelerator="none", policy="static", progress=False, unknown_keys="ignore")


def test_a_quantisation_that_is_not_read(edit_config: Callable[..., Path]) -> None:
    directory = edit_config(quantization_config={"quant_method": "hqq", "bits": 4})
    fails(UnsupportedCheckpointError, "quantised with hqq; readable are .*GPTQ.*AWQ", directory)


@pytest.mark.parametrize("host", ["1KiB", 7, 1e-9])
def test_host_memory_that_is_too_small(host: str | float, directory: Path) -> None:
    fails(BudgetError, r"need 0\.00 GiB of host memory, memory\.host allows", directory, memory={"host": host})


def test_host_memory_for_exactly_all_experts(directory: Path) -> None:
    load(directory, accelerator="none", policy="static", progress=False, memory={"host": 8})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_a_device_that_is_not_here(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])  # the device comes first: reading weights takes minutes
    with pytest.raises(DeviceError, match="cuda:0"):
        load(directory, accelerator="cuda:0", policy="static", progress=False)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])  # transformers makes an empty one of the second
def test_a_directory_without_a_tokenizer(family: str, edit_config: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"has no (usable )?tokenizer.*expected tokenizer\.json beside the weights"):
        load_tokenizer(edit_config(model_type=family))


def test_a_tokenizer_is_not_blamed_for_the_configuration(edit_config: Callable[..., Path]) -> None:
    directory = edit_config(model_type="qwen3_moe", rope_parameters={"rope_type": "yarn"})
    with pytest.raises(ModelError, match=r"transformers cannot read config\.json \(qwen3_moe\).*'factor'"):
        load_tokenizer(directory)


@pytest.mark.parametrize("old_shards", ["whole", "gone"])
def test_one_file_goes_before_the_index_of_an_earlier_save(
    old_shards: str, tmp_path: Path, mixtral: PreTrainedModel
) -> None:
    directory = tmp_path / "twice"
    mixtral.save_pretrained(directory, max_shard_size="40KB")
    shards = {file.name: file.read_bytes() for file in directory.glob("model-*.safetensors")}
    index = (directory / "model.safetensors.index.json").read_text()
    with torch.no_grad():
        mixtral.lm_head.weight += 1
    mixtral.save_pretrained(directory)
    (directory / "model.safetensors.index.json").write_text(index)
    for name, data in shards.items() if old_shards == "whole" else ():
        (directory / name).write_bytes(data)
    model = load(directory, accelerator="none", policy="static", progress=False)
    assert torch.equal(model.lm_head.weight, mixtral.lm_head.weight)


COUNTS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "num_key_value_heads")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", ["many", 2.5, [2], {}, 0, -1, float("nan")])
def test_a_size_that_cannot_be(name: str, value: Any, edit_config: Callable[..., Path]) -> None:
    with pytest.raises(HybriMoEError, match=rf"(?s){name}|config\.json") as caught:
        load(edit_config(**{name: value}), accelerator="none", policy="static", progress=False)
    assert name in str(caught.value) or "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "entry", [{"rope_parameters": 7}, {"hidden_act": "nosuch"}, {"rope_parameters": {"rope_type": "nosuch"}}]
)
def test_a_config_that_transformers_refuses(entry: dict[str, Any], edit_config: Callable[..., Path]) -> None:
    fails(ModelError, "config.json", edit_config(**entry))


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"max_new_tokens": -1}', '{"max_new_tokens": "many"}'])
def test_a_generation_config_that_transformers_refuses(text: str, directory: Path) -> None:
    (directory / "generation_config.json").write_text(text)
    fails(ModelError, r"generation_config\.json.*correct the file, or remove it", directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", "0.7"),
        ("top_k", "many"),
        ("top_k", -3),
        ("top_p", -0.5),
        ("top_p", "0.9"),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", "1.1"),
        ("bad_words_ids", 7),
    ],
)
def test_a_generation_config_that_no_token_can_be_chosen_with(field: str, value: Any, directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": True, field: value}))
    name = "penalty" if field == "repetition_penalty" else field
    fails(ModelError, rf"(?s)generation_config\.json: .*{name}.*correct the file, or remove it", directory)


def test_a_temperature_of_0_is_harmless_where_nothing_is_drawn(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.0}')
    model = load(directory, accelerator="none", policy="static", progress=False)
    assert not model.generation_config.do_sample


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "nosuch"}}', ""])
def test_a_broken_tokenizer(name: str, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(demo_model_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / name).write_text(text)
    with contextlib.suppress(ModelError):  # some of these load; no other error may come
        load_tokenizer(folder)


UNTIED = "lm_head.weight"


@pytest.fixture
def without_output_layer(edit: Edit, edit_config: Callable[..., Path]) -> Callable[[bool | None], Path]:
    """A checkpoint without an output layer, whose config.json says this of its embeddings (None: nothing)."""

    def make(tied: bool | None) -> Path:
        edit(lambda tensors: tensors.pop(UNTIED, None))
        directory = edit_config(tie_word_embeddings=tied)
        if tied is None:
            config = json.loads((directory / "config.json").read_text())
            del config["tie_word_embeddings"]
            (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


def test_no_output_layer_and_a_config_that_says_nothing_of_ties(
    without_output_layer: Callable[[bool | None], Path],
) -> None:
    directory = without_output_layer(None)
    told = r"does not say .*tie_word_embeddings.* no lm_head\.weight: .* model\.embed_tokens\.weight"
    with pytest.warns(TiedEmbeddingsWarning, match=told):
        model = load(directory, accelerator="none", policy="static", expert_dtype="float32", progress=False)
    said = load(without_output_layer(True), accelerator="none", policy="static", expert_dtype="float32", progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, said(ids).logits)


def test_no_output_layer_and_a_config_that_says_there_is_one(
    without_output_layer: Callable[[bool | None], Path],
) -> None:
    fails(CheckpointError, "lacks lm_head.weight", without_output_layer(False))


def test_an_output_layer_of_its_own_stays_where_the_config_says_nothing(
    directory: Path, mixtral: PreTrainedModel
) -> None:
    config = json.loads((directory / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (directory / "config.json").write_text(json.dumps(config))
    model = load(directory, accelerator="none", policy="static", expert_dtype="float32", progress=False)
    assert torch.equal(model.lm_head.weight, mixtral.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_family_that_ties_by_default_keeps_an_output_layer_of_its_own(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    config = Ernie4_5_MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, moe_num_experts=4, moe_k=2, moe_layer_start_index=0,
        moe_num_shared_experts=0, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    plain = make_model(config)
    plain.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    entries = json.loads(file.read_text())
    del entries["tie_word_embeddings"]
    file.write_text(json.dumps(entries))
    model = load(tmp_path / "model", accelerator="none", policy="static", expert_dtype="float32", progress=False)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_code_beside_the_weights_never_runs_and_nobody_is_asked(
    edit_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = edit_config(model_type="homemade", auto_map={"AutoConfig": "configuration_homemade.Homemade"})
    (directory / "configuration_homemade.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail("it asked"))
    fails(ModelError, "code of its own.*never runs.*'homemade'.*newer transformers", directory)


def test_a_tokenizer_that_is_code_never_runs_and_nobody_is_asked(
    edit_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = edit_config()
    (directory / "tokenization_homemade.py").write_text("raise SystemExit('it ran')")
    entry = {"tokenizer_class": "Homemade", "auto_map": {"AutoTokenizer": ["tokenization_homemade.Homemade", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(entry))
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail("it asked"))
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("model.layers.2.self_attn.q_proj.weight", "layers beyond num_hidden_layers=2"),
        ("model.layers.7.eh_proj.weight", "layers beyond num_hidden_layers=2"),
        ("mtp.layers.0.enorm.weight", "layers that predict several tokens"),
        ("model.layers.0.self_attn.k_scale", "scales of activations and of the KV cache"),
        ("model.layers.0.self_attn.k_proj.output_scale", "scales of activations and of the KV cache"),
        ("model.layers.0.self_attn.q_proj.input_scale", "scales of activations and of the KV cache"),
        ("model.layers.0.mlp.experts.down_proj_activation_scale", "scales of activations and of the KV cache"),
        ("model.layers.0.self_attn.q_proj.qscale_act", "scales of activations and of the KV cache"),
    ],
)
def test_what_a_model_has_no_use_for_is_left_out_and_said(key: str, what: str, edit: Edit) -> None:
    directory = edit(lambda tensors: tensors.update({key: torch.ones(3)}))
    with pytest.warns(LeftOutWarning, match=f"1 of {what}.*{key}"):
        load(directory, accelerator="none", policy="static", progress=False, packed_file=False)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "language_model."])
def test_wrappers_in_front_of_names(wrapper: str, edit: Edit, mixtral: PreTrainedModel) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[wrapper + key] = tensors.pop(key)

    model = load(edit(wrap), accelerator="none", policy="static", expert_dtype="float32", progress=False)
    model.hybrimoe.restore()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in mixtral.state_dict().items())


@pytest.mark.parametrize("chosen", [0, -1])
def test_no_experts_per_token(chosen: int, edit_config: Callable[..., Path]) -> None:
    fails(ModelError, "num_experts_per_tok|config.json", edit_config(num_experts_per_tok=chosen))
