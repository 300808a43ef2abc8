"""SentencePiece vocabularies in GGUF files ("llama"): tokens as SentencePiece makes them of the scores in the file."""

from __future__ import annotations

import io
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest

from hybrimoe.checkpoint.gguf.tokenizer import load_tokenizer

CORPUS = (
    "The experts of a layer are mapped, and the rest of the layer is read at the start of the program.",
    "A reader that reads the other half of it waits for the writer,  and writes what it has read.",
    "12 experts in 3 layers, 7 of them there already; that is what the start of a model is.",
)
TEXTS = (
    "The experts are mapped.", "  two  spaces", " leading", "trailing  ", "tab\tand\nnewline", "Grüße, 世界! 🙂",
    "1234 5.5", "", " ", "the theatre of the writers", "ReadReadread",
)  # fmt: skip
N_SPECIAL, N_BYTES, N_MERGES = 3, 256, 120


def spelled() -> list[list[str]]:
    return [list("▁" + text.replace(" ", "▁")) for text in CORPUS]


def merges() -> list[tuple[str, str]]:
    """The neighbours that SentencePiece's BPE joins, those that come most often first."""
    words, found = spelled(), list[tuple[str, str]]()
    while len(found) < N_MERGES:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        found.append(max(pairs.items(), key=lambda item: (item[1], item[0]))[0])
        words = [merged(word, "".join(found[-1])) for word in words]
    return found


def vocabulary() -> dict[str, float]:
    """Pieces and scores: what is joined, then characters."""
    characters = sorted({character for word in spelled() for character in word})
    order = [*map("".join, merges()), *characters]
    return {piece: -float(rank) for rank, piece in enumerate(dict.fromkeys(order))}


def merged(word: list[str], piece: str) -> list[str]:
    found: list[str] = []
    for part in word:
        if found and found[-1] + part == piece:
            found[-1] = piece
        else:
            found.append(part)
    return found


def encoded(text: str, scores: dict[str, float], *, space_before: bool = True) -> list[str]:
    """The slow way: the best pair of neighbours is joined, the first of several, until none is a piece; what is none
    then becomes bytes."""
    parts = list(("▁" if space_before and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return [
        piece for part in parts for piece in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
    ]


def write(
    file: Path, pieces: list[str], scores: list[float], kinds: list[int], model: str = "llama", **settings: bool
) -> Path:
    writer = gguf.GGUFWriter(str(file), model)
    writer.add_tokenizer_model(model)
    if model == "gemma4":
        writer.add_token_merges([f"{left} {right}" for left, right in merges()])
    writer.add_token_list([piece.encode() for piece in pieces])
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in settings.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_gemma4_has_merges_of_its_own_and_tokens_as_llama_cpp_makes_them(tmp_path: Path) -> None:
    llama_cpp: Any = pytest.importorskip("llama_cpp")
    kind = gguf.TokenType
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(N_BYTES)), "\n", *vocabulary()]
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * N_BYTES]
    kinds += [kind.NORMAL] * (len(pieces) - len(kinds))
    settings = {"add_space_prefix": False, "add_bos_token": True}
    file = tmp_path / "vocabulary.gguf"
    write(file, pieces, [0.0] * len(pieces), [int(k) for k in kinds], "gemma4", **settings)
    tokenizer, theirs = load_tokenizer(file), llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == theirs.tokenize(text.encode(), add_bos=True, special=True), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("space_before", [True, False])
def test_tokens_are_those_that_the_scores_give(space_before: bool, tmp_path: Path) -> None:
    scores, kind = vocabulary(), gguf.TokenType
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(N_BYTES)), *scores]
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * N_BYTES, *[kind.NORMAL] * len(scores)]
    values = [0.0] * (N_SPECIAL + N_BYTES) + list(scores.values())
    settings = {} if space_before else {"add_space_prefix": False}
    tokenizer = load_tokenizer(write(tmp_path / "vocabulary.gguf", pieces, values, [int(k) for k in kinds], **settings))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        expected = ["<s>", *encoded(text, scores, space_before=space_before)]
        assert tokenizer.convert_ids_to_tokens(ids) == expected, text
        if space_before:
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokens_are_those_of_the_library(tmp_path: Path) -> None:
    library: Any = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    processor = library.SentencePieceProcessor(model_proto=model.getvalue())
    ids, kind = range(processor.vocab_size()), gguf.TokenType
    special = [
        (processor.is_unknown, kind.UNKNOWN),
        (processor.is_control, kind.CONTROL),
        (processor.is_byte, kind.BYTE),
    ]
    kinds = [next((int(name) for test, name in special if test(number)), int(kind.NORMAL)) for number in ids]
    pieces, scores = [processor.id_to_piece(n) for n in ids], [processor.get_score(n) for n in ids]
    tokenizer = load_tokenizer(write(tmp_path / "vocabulary.gguf", pieces, scores, kinds))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [1, *processor.encode(text)], text
