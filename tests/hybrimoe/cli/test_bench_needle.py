"""`hybrimoe bench needle`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hybrimoe.bench.quality import needle
from hybrimoe.generation import engine


def asked(hybrimoe: Any, *more: str) -> list[dict[str, Any]]:
    result = hybrimoe("bench", "needle", "--context", "90", "--depth", "0.2", "--depth", "0.9", *more, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert (told["model"], told["model_context"], told["text"]) == ("demo", 2048, "held-out.txt")
    return list(told["rows"])


def test_a_row_for_each_dtype_and_depth(hybrimoe: Any) -> None:
    rows = asked(hybrimoe, "--kv-dtype", "auto", "--kv-dtype", "int8")
    assert [(row["kv_dtype"], row["depth"]) for row in rows] == [
        ("auto", 0.2), ("auto", 0.9), ("int8", 0.2), ("int8", 0.9)
    ]  # fmt: skip
    for row in rows:
        assert row["rank"] >= 1
        assert 0 < row["probability"] < 1
    assert rows[0]["probability"] == pytest.approx(rows[2]["probability"], rel=0.3), "8 bits change little"
    assert rows[0]["probability"] != rows[2]["probability"]


def test_the_sentence_stands_where_it_should_and_a_model_that_reads_it_has_found_it(
    hybrimoe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is replaced by one that knows the word if, and only if, the sentence is before the question."""
    texts: list[list[int]] = []

    def copying(self: Any, token_ids: list[int], cache: Any) -> torch.Tensor:
        texts.append(list(token_ids))
        text, logits = self.tokenizer.decode(token_ids), torch.zeros(len(self.tokenizer))
        for word in needle.WORDS:
            if f"The secret word is {word}. Remember it." in text:
                question = self.tokenizer(needle.QUESTION, add_special_tokens=False)["input_ids"]
                said = self.tokenizer(f"{needle.QUESTION} {word}", add_special_tokens=False)["input_ids"]
                logits[said[len(question)]] = 20.0
        return logits

    monkeypatch.setattr(engine.TextGenerator, "forward", copying)
    shallow, deep = asked(hybrimoe)
    assert {len(text) for text in texts} == {90}
    assert (shallow["word"], shallow["rank"]) == ("elephant", 1)
    assert (deep["word"], deep["rank"]) == ("violet", 1)
    assert min(shallow["probability"], deep["probability"]) > 0.99 > 0.01 > shallow["probability_without"]


@pytest.mark.parametrize(("context", "words"), [("4000", "context is 2048 tokens"), ("20", "sentence alone takes")])
def test_a_context_that_cannot_be_is_refused(hybrimoe: Any, context: str, words: str) -> None:
    result = hybrimoe("bench", "needle", "--context", context)
    assert result.code == 2
    assert words in result.err


def test_a_stretched_context(hybrimoe: Any) -> None:
    stretched = ("--rope-scaling", "dynamic", "--rope-scale", "2")
    result = hybrimoe("bench", "needle", "--context", "2500", "--depth", "0.9", *stretched, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert (told["model_context"], told["rope"]) == (4096, {"scaling": "dynamic", "factor": 2.0})
    assert told["rows"][0]["context"] == 2500
