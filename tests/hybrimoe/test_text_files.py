"""Text files as Windows' programs write them."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hybrimoe.checkpoint import load, load_tokenizer
from hybrimoe.demo import demo_model_path
from hybrimoe.errors import ModelError
from hybrimoe.text_files import plain_texts, read_text

TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WORDS = "The king says: naïve 模型"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model; its weights are linked."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in TEXTS:
        shutil.copyfile(demo_model_path() / name, folder / name)
    (folder / "model.safetensors").symlink_to(demo_model_path() / "model.safetensors")
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_marks_say_the_encoding_and_are_no_part_of_the_text(encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    file = tmp_path / "text"
    file.write_bytes((mark + WORDS + "\r\nnext\rlast\n").encode(encoding))
    assert read_text(file) == WORDS + "\nnext\nlast\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in this system's folders")
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(WORDS,))
    writer.start()
    assert read_text(pipe) == WORDS
    writer.join()


def test_a_folder_without_marks_is_used_as_it_is(model: Path) -> None:
    with plain_texts(model) as plain:
        assert plain == model


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_every_text_of_a_model_may_have_a_mark(encoding: str, model: Path) -> None:
    expected = load_tokenizer(model)
    for name in TEXTS:
        file = model / name
        file.write_bytes(file.read_text(encoding="utf-8").encode(encoding))
    tokenizer = load_tokenizer(model)
    assert tokenizer(WORDS)["input_ids"] == expected(WORDS)["input_ids"]
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.name_or_path == str(model)
    loaded = load(model, accelerator="none", progress=False, packed_file=False)
    assert loaded.config.name_or_path == str(model)
    assert loaded.generation_config.top_k == json.loads(read_text(model / "generation_config.json"))["top_k"]


@pytest.mark.parametrize(
    ("content", "packages"),
    [(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", "sentencepiece protobuf"), (b"IQ== 0\nIg== 1\n", "tiktoken")],
)
def test_a_tokenizer_in_need_of_a_package_names_it(
    content: bytes, packages: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr("hybrimoe.checkpoint.tokenizer.find_spec", lambda name: None)

    def fails(*_: object, **__: object) -> None:
        raise ImportError("whatever transformers says")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(ModelError, match=rf"tokenizer.model only.*pip install {packages}; or fetch tokenizer.json"):
        load_tokenizer(model)


def test_a_sentencepiece_tokenizer_is_read_where_the_package_is(model: Path) -> None:
    pieces = pytest.importorskip("sentencepiece")
    text = model / "words.txt"
    text.write_text("\n".join(f"the king of {place} has {n} horses" for n, place in enumerate(["rome", "gaul"] * 40)))
    pieces.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(model / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(model)
    expected = pieces.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    for words in ("the king of gaul", "has  12 horses", WORDS):
        assert tokenizer(words, add_special_tokens=False)["input_ids"] == expected.encode(words)
