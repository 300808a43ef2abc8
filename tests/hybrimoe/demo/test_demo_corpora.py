import struct
import zlib

import pytest

from hybrimoe.demo.training.corpora import read_corpora
from hybrimoe.demo.training.corpora.austen import r_character_vector, r_lazyload_blobs, unwrap
from hybrimoe.demo.training.corpora.document import HELD_OUT_PERCENT, Document
from hybrimoe.demo.training.corpora.postgresql import html_text
from hybrimoe.demo.training.corpora.sword import osis_text, ztext_entries
from hybrimoe.demo.training.errors import CorpusError


def test_all_domains_are_read_in_a_fixed_order(corpora_folder):
    documents = read_corpora(corpora_folder)
    assert [(d.domain, d.name) for d in documents] == [
        ("austen", "A NOVEL/1"),
        ("austen", "A NOVEL/2"),
        ("austen", "ANOTHER/1"),
        ("web", "Gen.1"),
        ("web", "Gen.2"),
        *(("web", f"Matt.{number}") for number in range(1, 5)),
        ("postgresql", "sql-set"),
        *(("postgresql", f"view-{number}") for number in range(6)),
    ]


def test_chapters_are_unwrapped(corpora_folder):
    chapter = read_corpora(corpora_folder)[0].text
    assert chapter.startswith("CHAPTER I\n\nThe house was quiet. The house was quiet.")
    assert "CHAPTER II" not in chapter


def test_osis_markup_and_front_matter_are_dropped(corpora_folder):
    chapter = next(d.text for d in read_corpora(corpora_folder) if d.name == "Gen.1")
    assert chapter.startswith("Genesis 1\n\nIn the beginning & after. In")
    assert chapter.endswith("\n\nA new paragraph.")
    assert not any(word in chapter for word in ("note", "Front", "First", "<", "lemma"))


def test_a_missing_package_says_how_to_get_it(tmp_path):
    with pytest.raises(CorpusError, match=r"apt-get download r-cran-janeaustenr && dpkg-deb -x"):
        read_corpora(tmp_path)


def test_a_package_without_its_data_file_is_named(corpora_folder):
    (corpora_folder / "r-cran-janeaustenr" / "data" / "Rdata.rdb").unlink()
    with pytest.raises(CorpusError, match=r"Rdata\.rdb"):
        read_corpora(corpora_folder)


def test_html_without_pages_is_an_error(corpora_folder):
    for page in (corpora_folder / "postgresql-doc-15" / "html").iterdir():
        page.unlink()
    with pytest.raises(CorpusError, match="HTML pages"):
        read_corpora(corpora_folder)


def test_html_keeps_code_and_drops_navigation():
    text = html_text(
        '<head><title>t</title></head><div class="navheader"><a>Prev</a><img /><hr></div>'
        "<p>Some\n <code>text</code></p><pre>SELECT  1\n  + 2;</pre><p>a<br/>b</p>"
    )
    assert text == "Some text\n\nSELECT  1\n  + 2;\n\na b"


def test_osis_lines_and_entities():
    assert osis_text('<l level="1" sID="a"/>Sing,<l level="2" sID="b"/>earth &lt;now&gt; &amp;amp;') == (
        "Sing,\nearth <now> &amp;"
    )


def test_unwrap_joins_lines_and_keeps_paragraphs():
    assert unwrap(["", "a  b", " c ", "", "", "d"]) == "a b c\n\nd"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-9], "bytes from the blob|zlib"),
        (lambda data: struct.pack(">I", 1) + data[4:], "expected 1 bytes"),
        (lambda data: data + b"\x00", r"\[u32 length\]\[zlib\]"),
        (lambda data: data[:4] + b"junk" + data[8:], "zlib"),
    ],
)
def test_a_damaged_rdb_file_is_an_error(damage, message):
    whole = struct.pack(">I", 1000) + zlib.compress(b"ab" * 500)
    assert list(r_lazyload_blobs(whole)) == [b"ab" * 500]
    with pytest.raises(CorpusError, match=message):
        list(r_lazyload_blobs(damage(whole)))


HEADER = b"X\n" + struct.pack(">III", 2, 0, 0)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"B\n" + bytes(30), "XDR"),
        (HEADER + struct.pack(">II", 13, 1), "type 13"),
        (HEADER + struct.pack(">II", 16, 1) + struct.pack(">II", 10, 1), "type 10"),
        (HEADER + struct.pack(">II", 16, 1) + struct.pack(">II", 9, 5) + b"abc", "5 bytes of string"),
        (HEADER + struct.pack(">II", 16, 2) + struct.pack(">II", 9, 1) + b"a", "truncated"),
        (b"X\n", "truncated"),
    ],
)
def test_what_is_no_character_vector_is_an_error(blob, message):
    with pytest.raises(CorpusError, match=message):
        r_character_vector(blob)


def test_a_damaged_sword_module_is_an_error():
    text = b"one two"
    packed = zlib.compress(text)
    blocks = struct.pack("<III", 0, len(packed), len(text))
    assert list(ztext_entries(blocks, struct.pack("<IIH", 0, 4, 3), packed)) == ["two"]
    with pytest.raises(CorpusError, match="expected 9 bytes at 4 of block 0"):
        list(ztext_entries(blocks, struct.pack("<IIH", 0, 4, 9), packed))
    with pytest.raises(CorpusError, match="zlib block 1"):
        list(ztext_entries(blocks, struct.pack("<IIH", 1, 0, 3), packed))
    with pytest.raises(CorpusError, match="expected 8 bytes in block 0"):
        list(ztext_entries(struct.pack("<III", 0, len(packed), 8), struct.pack("<IIH", 0, 0, 3), packed))


def test_the_held_out_share_is_decided_by_name_alone():
    documents = [Document("web", f"chapter {number}", "text") for number in range(5000)]
    share = 100 * sum(document.held_out for document in documents) / len(documents)
    assert abs(share - HELD_OUT_PERCENT) < 1
    assert [Document("web", d.name, "other").held_out for d in documents] == [d.held_out for d in documents]
