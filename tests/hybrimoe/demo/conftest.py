"""Tiny stand-ins for the corpora, the tokenizer and the model of the demo."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrimoe.demo.training.architecture import Shape
from hybrimoe.demo.training.data import Corpus
from hybrimoe.demo.training.settings import Settings
from hybrimoe.demo.training.tokenizer import train_tokenizer

TINY = Shape(
    vocab_size=300, hidden_size=32, expert_size=32, num_layers=2, num_experts=4, top_k=2, num_heads=2, head_dim=16
)

PROSE = "It was a long evening, and nobody in the house had expected the visit. " * 5


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return train_tokenizer([PROSE, "SELECT relname FROM pg_class;"], vocab_size=300, max_tokens=64)


@pytest.fixture
def tiny_corpus():
    rng = np.random.default_rng(7)
    pattern = np.tile(np.arange(3, 43, dtype=np.int32), 30)
    noise = rng.integers(3, 260, size=len(pattern), dtype=np.int32)
    stream = np.where(rng.random(len(pattern)) < 0.2, noise, pattern).astype(np.int32)
    return Corpus(train=stream, held_out={"pattern": stream[:100]})


@pytest.fixture
def tiny_settings():
    return Settings(
        shape=TINY,
        batch_size=4,
        seq_len=16,
        stable_seq_len=8,
        learning_rate=1e-2,
        warmup_steps=3,
        decay_share=0.5,
        precision="fp32",
        max_tokens=4 * 16 * 15,
        threads=2,
        log_steps=1,
        checkpoint_steps=4,
        evaluate_steps=5,
        evaluate_windows=4,
    )


def r_data(lines: list[str | None], version: int = 3) -> bytes:
    """One entry of an .rdb file: a character vector, serialised as R does it."""
    body = b"X\n" + struct.pack(">III", version, 0x040001, 0x030500)
    if version == 3:
        body += struct.pack(">I", 5) + b"UTF-8"
    body += struct.pack(">II", 16, len(lines))
    for line in lines:
        text = b"" if line is None else line.encode()
        length = 0xFFFFFFFF if line is None else len(text)
        body += struct.pack(">II", 0x00040009, length) + text
    return struct.pack(">I", len(body)) + zlib.compress(body)


def write_sword(folder: Path, testament: str, books: list[list[str]]) -> None:
    """A zText module part with one block a book; an empty entry is an absent verse."""
    blocks, verses, data = b"", b"", b""
    for number, entries in enumerate(books):
        text = "".join(entries).encode()
        packed = zlib.compress(text)
        blocks += struct.pack("<III", len(data), len(packed), len(text))
        data += packed
        start = 0
        for entry in entries:
            size = len(entry.encode())
            verses += struct.pack("<IIH", number, start, size)
            start += size
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".bzs", blocks), (".bzv", verses), (".bzz", data)):
        (folder / f"{testament}{suffix}").write_bytes(content)


@pytest.fixture
def corpora_folder(tmp_path):
    """The three packages in miniature."""
    austen = tmp_path / "r-cran-janeaustenr" / "data"
    austen.mkdir(parents=True)
    chapters: list[str | None] = ["A NOVEL", "", "CHAPTER I", "", *["The house was", "quiet."] * 40]
    chapters += [None, "CHAPTER II", "", *["Nobody came."] * 40]
    (austen / "Rdata.rdb").write_bytes(r_data(chapters) + r_data(["ANOTHER", "Chapter 1", *["Rain."] * 60], version=2))
    sword = tmp_path / "sword-text-web" / "ztext"
    title = '<milestone n="Genesis" type="x-usfm-toc2"/> <title>The First Book</title> Front matter.'
    opening = '<chapter n="1" osisID="Gen.1" sID="Gen.1"/>'
    verse = '<w lemma="strong:H1">In</w> the beginning<note>A note.</note> &amp; <w>after</w>. ' * 12
    paragraph = '<div sID="g1" type="x-p"/>A new paragraph. '
    second = '<chapter eID="x"/><chapter n="2" osisID="Gen.2" sID="Gen.2"/>' + "The seventh day. " * 20
    write_sword(sword, "ot", [[title, opening, verse, "", paragraph, second]])
    gospel = [f'<chapter n="{n}" osisID="Matt.{n}" sID="Matt.{n}"/>' + "The book. " * 30 for n in range(1, 5)]
    write_sword(sword, "nt", [gospel])
    pages = tmp_path / "postgresql-doc-15" / "html"
    pages.mkdir(parents=True)
    (pages / "sql-set.html").write_text(
        '<html><head><title>no</title></head><body><div class="navheader"><p>Prev</p><hr /></div>'
        "<h2>SET</h2><p>change a\n   run-time&nbsp;parameter &lt;now&gt;</p><pre>\nSET  x\n  = 1;\n</pre>"
        "<ul><li><p>" + "one thing. " * 30 + "</p></li></ul><table><tr><td>a</td><td>b</td></tr></table>"
        '<div class="navfooter">Next</div></body></html>'
    )
    for number in range(6):
        (pages / f"view-{number}.html").write_text("<p>" + f"The view {number} shows every session. " * 20 + "</p>")
    (pages / "bookindex.html").write_text("<p>" + "index " * 100 + "</p>")
    return tmp_path
