"""Text becomes the tokens that llama.cpp makes of it, for every way of splitting text that is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from hybrimoe import compat
from hybrimoe.checkpoint.gguf.tokenizer import SPLITS, load_tokenizer
from hybrimoe.demo import demo_model_path

TEXTS = (
    "Hello world, it's 12345 degrees. Don't   stop!\n\n  ok\tTab",
    "Ünïcode ñandú Übermorgen 中文字符 日本語テキスト 한국어",
    "def f(x):\n    return x**2 + 3.14  # comment\r\n",
    "   leading and trailing   ",
    "I'VE we'll they'RE HELLO camelCase 1,000,000 $5.00 (a+b)=c",
    "emoji 🚀🦙 test\n\n\n",
    '!!!??? ...--- ``` "quotes" <|bos|>x',
    "123abc456 a1b2 ٣٤٥",
)


def vocabulary(path: Path, split: str) -> Path:
    """The demo model's vocabulary, without a model, as one that splits text like `split`."""
    model = json.loads((demo_model_path() / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    for name in ("block_count", "embedding_length", "head_count", "feed_forward_length", "context_length"):
        getattr(writer, f"add_{name}")(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(2)
    writer.add_expert_used_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_way_makes_tokens_that_are_the_text_again(tmp_path: Path) -> None:
    for split in (*SPLITS, *compat.gguf_splits()):
        tokenizer = load_tokenizer(vocabulary(tmp_path / f"{split}.gguf", split))
        for text in TEXTS:
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text, split


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_llama_cpp_makes_the_same_tokens(split: str, tmp_path: Path) -> None:
    llama_cpp: Any = pytest.importorskip("llama_cpp")
    file = vocabulary(tmp_path / "vocabulary.gguf", split)
    theirs, ours = llama_cpp.Llama(str(file), vocab_only=True, verbose=False), load_tokenizer(file)
    for text in TEXTS:
        expected = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert ours(text, add_special_tokens=False)["input_ids"] == expected, text
    assert (ours("Hi")["input_ids"][0] == 0) == (theirs.tokenize(b"Hi", add_bos=True)[0] == 0)
