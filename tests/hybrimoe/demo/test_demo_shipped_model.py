import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from hybrimoe.demo import demo_model_path
from hybrimoe.demo.training.data import encode_stream, token_byte_lengths
from hybrimoe.demo.training.evaluate import evaluate_stream
from hybrimoe.errors import ModelError

MAX_WEIGHT_BYTES = 25_000_000
MAX_PLOT_BYTES = 100_000

OUR_TEXTS = {
    # Written for this test in the manner of the training texts; none of it is from them.
    "novel": (
        "Mr. Harcourt was not a man to be easily persuaded, and when his sister told him of the engagement he said "
        "only that he hoped they would be happy. She could not but feel the coldness of such an answer. The ladies "
        "walked together in the garden for half an hour, and Miss Bennet, who had heard every thing from her mother, "
        "was too well bred to ask any questions. At dinner the conversation was of the weather and the roads; nobody "
        "mentioned the letter, though every body had read it."
    ),
    "scripture": (
        "In the morning the king sent for his servants and said to them, “Go up to the city, and tell the people that "
        "I will come to them before the feast.” So they went out from his presence and came to the gate of the city. "
        "The elders of the people came out to meet them, and they said, “Peace to you. Has the king remembered his "
        "servants?” They answered, “He has remembered you; he will give you bread and wine, and oil for your lamps.”"
    ),
    "manual": (
        "This function returns the number of rows in the table. If the table does not exist, an error is reported "
        "unless the option is set to off. The default value of this parameter is false. When the server is started, "
        "the configuration file is read and the values of all parameters are checked. For example, to create an index "
        "on a column of the table, use the following command:\n\nCREATE INDEX my_index ON my_table (my_column);"
    ),
}

MAX_BITS_PER_BYTE = {"novel": 1.45, "scripture": 1.12, "manual": 0.97}
"""A tenth above what the shipped model scores; random weights score 2.8 to 3.1, bzip2 above 5 on texts so short."""

MIN_LOAD_ENTROPY = 0.85
"""A layer that used only 19 of its 32 experts, each alike, would score 0.85; the shipped layers score 0.96 to 0.99."""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)


def test_it_is_a_qwen3_moe_of_the_promised_size(model):
    config = model.config
    assert isinstance(model, Qwen3MoeForCausalLM)
    assert 8_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 12_000_000
    assert config.num_hidden_layers >= 6
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (32, 4, True)
    assert config.tie_word_embeddings
    assert config.hidden_size % 32 == config.moe_intermediate_size % 32 == 0
    assert config.max_position_embeddings >= 2048


def test_the_files_are_small_and_in_hugging_face_layout():
    folder = demo_model_path()
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= MAX_WEIGHT_BYTES
    with safe_open(weights, "pt") as file:
        names = set(file.keys())
        gate = file.get_tensor("model.layers.5.mlp.experts.31.gate_proj.weight")
    assert gate.dtype == torch.bfloat16
    assert gate.shape == (64, 192)
    assert "lm_head.weight" not in names
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["do_sample"]
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (0, 1, 2)


def test_the_card_has_what_was_promised():
    folder = demo_model_path()
    card = (folder / "README.md").read_text()
    for part in ("r-cran-janeaustenr", "sword-text-web", "postgresql-doc-15", "python -m hybrimoe.demo.training.train",
                 "## Held-out scores", "## Router load per layer", "## Limitations", "## Samples"):  # fmt: skip
        assert part in card
    assert len(re.findall(r"^\| \d \| [01]\.\d{3} \|", card, re.MULTILINE)) == 6
    assert (folder / "curve.svg").stat().st_size <= MAX_PLOT_BYTES
    notices = (folder / "THIRD-PARTY.md").read_text()
    assert "PostgreSQL Global Development Group" in notices
    assert "World English Bible" in notices


@pytest.mark.parametrize("name", OUR_TEXTS)
def test_it_predicts_text_that_it_never_saw(model, tokenizer, name):
    stream = encode_stream([OUR_TEXTS[name]], tokenizer)
    result = evaluate_stream(model, stream, token_byte_lengths(tokenizer), seq_len=512)
    assert result.n_bytes == len(OUR_TEXTS[name].encode())
    assert result.bits_per_byte < MAX_BITS_PER_BYTE[name]


def test_no_layer_of_the_router_has_collapsed(model, tokenizer):
    stream = encode_stream(list(OUR_TEXTS.values()), tokenizer)
    result = evaluate_stream(model, stream, token_byte_lengths(tokenizer), seq_len=512)
    entropies = result.entropies()
    assert min(entropies) > MIN_LOAD_ENTROPY, entropies
    assert result.load.max() < 0.25, "no expert may take every token (one in four of the choices)"


def test_the_tokenizer_keeps_every_byte(tokenizer):
    text = "naïve — 漢字 🙂\r\n\tSELECT 'x';\x00\x7f " + "".join(map(chr, range(1, 256)))
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    lengths = token_byte_lengths(tokenizer)
    assert int((lengths == 1).sum()) == 256
    assert len(tokenizer) == 4096


def test_it_generates_the_same_text_twice(model, tokenizer):
    inputs = tokenizer("The king said", return_tensors="pt")
    texts = [model.generate(**inputs, do_sample=False, max_new_tokens=12) for _ in range(2)]
    assert torch.equal(*texts)
    assert np.unique(texts[0].numpy()).size > 5


def test_its_place_is_known_without_loading_torch():
    program = "import sys, hybrimoe.demo as d; d.demo_model_path(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_installation_without_the_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrimoe.demo.files", lambda _: tmp_path)
    with pytest.raises(ModelError, match="reinstall hybrimoe"):
        demo_model_path()


def test_a_conversation_is_one_text(tokenizer):
    messages = [{"role": "user", "content": "It is a truth"}, {"role": "assistant", "content": " indeed."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|bos|>It is a truth indeed."
