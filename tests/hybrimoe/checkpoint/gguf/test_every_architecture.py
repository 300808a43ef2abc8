"""Every architecture of GGUF files that is read: the model that the file gives is the model it was made from, and
llama.cpp, on the same file, gives the same logits."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hybrimoe.checkpoint import load
from hybrimoe.checkpoint.gguf.families import FAMILIES

from ..models import FLOAT32, TOKENS, logits
from .conversion import ARCHITECTURES
from .models import OVERRIDES, gguf_model, saved_model

REPRESENTATIVE = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")
MODELS = [
    pytest.param(name, marks=[pytest.mark.families, *[pytest.mark.representative] * (name in REPRESENTATIVE)])
    for name in ARCHITECTURES
]
LLAMA_CPP_TOLERANCE = 2e-5  # of logits up to 1: both compute in float32, in other orders of summation
AMPLIFIED = {
    "afmoe": 1e-4,  # it norms what attention and experts give, which is small in a random model
    "gemma4": 1e-3,  # llama.cpp reads its GELU from a table of float16
}
OTHER_MATHS = {
    "phimoe": "llama.cpp takes RMS norms and weights of a softmax; the model has layer norms and sparse mixing",
    "hy_v4": "llama.cpp rotates neighbouring dimensions, transformers halves of a head",
}
RUN_LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
# with a cache of float32
model = Llama(sys.argv[1], logits_all=True, n_ctx=256, n_batch=256, n_threads=1, verbose=False, type_k=0, type_v=0)
model.eval(json.loads(sys.argv[2]))
print(json.dumps(model._scores.tolist()))
"""


def test_every_architecture_of_the_table_is_tested() -> None:
    assert set(ARCHITECTURES.values()) == FAMILIES.keys()


@pytest.mark.parametrize("family", MODELS)
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(family: str, tmp_path: Path) -> None:
    expected = logits(load(saved_model(family, tmp_path), **FLOAT32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of the file is left out, nothing has to be guessed
        found = load(gguf_model(family, tmp_path), **FLOAT32)
    assert torch.equal(logits(found), expected)
    assert all(weight.is_contiguous() for weight in found.parameters()), "the compiled step reads rows"
    assert found.config.model_type == json.loads((tmp_path / "model" / "config.json").read_text())["model_type"]


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("family", MODELS)
def test_llama_cpp_gives_the_same_logits_on_the_same_file(family: str, tmp_path: Path) -> None:
    if family in OTHER_MATHS:
        pytest.skip(OTHER_MATHS[family])
    file = gguf_model(family, tmp_path)
    difference = logits(load(file, **FLOAT32)) - by_llama_cpp(file, TOKENS)
    assert difference.abs().max() < AMPLIFIED.get(family, LLAMA_CPP_TOLERANCE)


def by_llama_cpp(file: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of [1, n] tokens."""
    arguments = [sys.executable, "-c", RUN_LLAMA_CPP, str(file), json.dumps(tokens[0].tolist())]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)  # it aborts on errors
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout))[None]


@pytest.mark.families
@pytest.mark.parametrize("family", ["deepseek_v4", "glm5_next"])
def test_long_texts_are_compressed_alike(family: str, tmp_path: Path) -> None:
    """DeepSeek-V4 makes one entry of 128 tokens; GLM-5.3 sees two of 70 pools."""
    tokens = torch.randint(3, 96, (1, 140), generator=torch.Generator().manual_seed(0))
    expected = load(saved_model(family, tmp_path), **FLOAT32)
    file = gguf_model(family, tmp_path)
    with torch.no_grad():
        found, wanted = load(file, **FLOAT32)(tokens).logits, expected(tokens).logits
    assert torch.equal(found, wanted)
    if importlib.util.find_spec("llama_cpp") is not None:
        assert (found - by_llama_cpp(file, tokens)).abs().max() < LLAMA_CPP_TOLERANCE


@pytest.mark.families
def test_rotated_halves_of_heads_are_scaled_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does it: llama.cpp takes the factors of whole heads."""
    scaling = {
        "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    rotations = OVERRIDES["step3p7"]["rope_parameters"]
    full = rotations["full_attention"] | scaling
    changed = OVERRIDES["step3p7"] | {"rope_parameters": rotations | {"full_attention": full}}
    plain = logits(load(saved_model("step3p7", tmp_path / "plain"), **FLOAT32))
    monkeypatch.setitem(OVERRIDES, "step3p7", changed)
    expected = logits(load(saved_model("step3p7", tmp_path), **FLOAT32))
    assert not torch.equal(plain, expected)
    assert torch.equal(logits(load(gguf_model("step3p7", tmp_path), **FLOAT32)), expected)


@pytest.mark.families
def test_blocks_are_chosen_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OVERRIDES, "qwen4_exp", OVERRIDES["qwen4_exp"] | {"indexer_budget": 4})
    expected = logits(load(saved_model("qwen4_exp", tmp_path), **FLOAT32))
    assert torch.equal(logits(load(gguf_model("qwen4_exp", tmp_path), **FLOAT32)), expected)
    monkeypatch.setitem(OVERRIDES, "qwen4_exp", OVERRIDES["qwen4_exp"] | {"indexer_budget": 32})
    assert not torch.equal(logits(load(saved_model("qwen4_exp", tmp_path), **FLOAT32)), expected)
