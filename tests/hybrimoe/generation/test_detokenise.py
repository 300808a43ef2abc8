"""Streamed text against the text of all tokens at once."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hybrimoe.generation.detokenise import IncrementalDecoder, StopTexts

TEXTS = [
    "plain words, all ASCII",
    "naïve café",
    "日本語のテキスト",
    "a🙂b👩‍👩‍👧c",
    "tab\tnew\n\nline  two spaces",
    "Ω≈ç√∫",
]


def pieces(tokenizer, ids, prompt_ids=()):
    decoder = IncrementalDecoder(tokenizer, prompt_ids)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


def test_joined_pieces_are_the_text_and_no_piece_has_a_partial_character(byte_tokenizer):
    for text in TEXTS:
        got = pieces(byte_tokenizer, byte_tokenizer(text)["input_ids"])
        assert "".join(got) == text
        assert not any("\ufffd" in piece for piece in got)


def test_special_tokens_that_are_shown_give_their_names_and_the_others_nothing(byte_tokenizer):
    special = byte_tokenizer.all_special_ids[0]
    name, (half, *_) = byte_tokenizer.convert_ids_to_tokens(special), byte_tokenizer("é")["input_ids"]
    before, after = byte_tokenizer("a é")["input_ids"], byte_tokenizer("ü b")["input_ids"]
    for shown, expected in ((frozenset({special}), f"a é{name}ü b"), (frozenset(), "a éü b")):
        decoder = IncrementalDecoder(byte_tokenizer, (), shown)
        text = "".join(decoder.push(token) for token in [*before, special, *after]) + decoder.flush()
        assert text == expected
        assert decoder.n_characters == len(expected)
    decoder = IncrementalDecoder(byte_tokenizer, (), frozenset({special}))
    assert "".join(decoder.push(token) for token in [half, special, *after]) == f"\ufffd{name}ü b"


def test_a_prompt_is_context_and_is_not_given_again(byte_tokenizer):
    prompt, text = "für dich: ", "größer 🙂"
    got = pieces(byte_tokenizer, byte_tokenizer(text)["input_ids"], byte_tokenizer(prompt)["input_ids"])
    assert "".join(got) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), prompt=st.text(max_size=10))
def test_every_text_comes_out_whole(byte_tokenizer, text, prompt):
    got = pieces(byte_tokenizer, byte_tokenizer(text)["input_ids"], byte_tokenizer(prompt)["input_ids"])
    assert "".join(got) == text


def test_bytes_that_are_no_character_do_not_stop_the_stream(byte_tokenizer):
    lead = byte_tokenizer("é")["input_ids"][0]  # the first of two bytes
    word = byte_tokenizer("abc")["input_ids"]
    got = pieces(byte_tokenizer, [lead] * 20 + word)
    assert "".join(got).endswith("abc")
    assert "\ufffd" in "".join(got)
    assert "".join(pieces(byte_tokenizer, [*word, lead])) == "abc\ufffd"


def test_special_tokens_give_no_text(byte_tokenizer):
    eos = byte_tokenizer.eos_token_id
    ids = byte_tokenizer("ab")["input_ids"]
    assert "".join(pieces(byte_tokenizer, [ids[0], *[eos] * 12, ids[1], eos])) == "ab"


@pytest.fixture(scope="module")
def fallback_tokenizer():
    """Llama's form: a few words, all else as bytes `<0x00>`, spaces as `▁`, the first one stripped."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁a",
        "▁▁",
        "a",
        "é",
        "日",
        "\ufffd",
    ]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def at_once(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


CHARACTERS = "🙂👩‍👧é日€aΩ"


def bytes_of(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]


@settings(max_examples=500, deadline=None)
@given(data=st.data(), prompt=st.text(CHARACTERS + " ", max_size=9))
def test_byte_fallback_streams_what_decoding_all_tokens_at_once_gives(fallback_tokenizer, data, prompt):
    tokenizer = fallback_tokenizer
    characters = st.text(CHARACTERS, min_size=1, max_size=4).map(lambda text: bytes_of(tokenizer, text))
    some = st.integers(0, len(tokenizer) - 1).map(lambda token: [token])
    ids = list(chain(*data.draw(st.lists(characters | some, max_size=30))))
    prompt_ids = [*bytes_of(tokenizer, prompt), tokenizer.convert_tokens_to_ids("a")] if prompt else []
    expected = at_once(tokenizer, prompt_ids + ids)[len(at_once(tokenizer, prompt_ids)) :]
    assert "".join(pieces(tokenizer, ids, prompt_ids)) == expected


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_byte_level_streams_what_decoding_all_tokens_at_once_gives(byte_tokenizer, data):
    characters = st.text(CHARACTERS, min_size=1, max_size=4).map(lambda text: byte_tokenizer(text)["input_ids"])
    some = st.integers(0, len(byte_tokenizer) - 1).map(lambda token: [token])
    ids = list(chain(*data.draw(st.lists(characters | some, max_size=30))))
    assert "".join(pieces(byte_tokenizer, ids)) == at_once(byte_tokenizer, ids)


def test_a_run_of_bytes_is_shown_when_the_next_word_begins(fallback_tokenizer):
    word = fallback_tokenizer.convert_tokens_to_ids("▁a")
    got = pieces(fallback_tokenizer, [*bytes_of(fallback_tokenizer, "👩‍👧"), word, word])
    assert [piece for piece in got if piece] == ["👩‍👧 a", " a"]


def test_the_window_stays_short_however_long_the_text(byte_tokenizer):
    decoder = IncrementalDecoder(byte_tokenizer)
    for token in byte_tokenizer("größer 🙂 " * 200)["input_ids"]:
        decoder.push(token)
        assert len(decoder._window) < 24


def shown(stop, stream):
    stops = StopTexts(stop)
    text = "".join(stops.push(piece) for piece in stream)
    return text + stops.flush(), stops.found


def test_a_stop_text_over_several_pieces_ends_the_text_before_it():
    assert shown(["END"], ["on", "e E", "N", "D two"]) == ("one ", "END")
    assert shown(["END"], ["one E", "N", "ough"]) == ("one ENough", None)
    assert shown(["\n\n", "END"], ["a\n", "bEND\n\n"]) == ("a\nb", "END")
    assert shown([], ["a", "b"]) == ("ab", None)


@settings(max_examples=200, deadline=None)
@given(
    stream=st.lists(st.text(alphabet="ab", max_size=3), max_size=12),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_streaming_finds_what_a_search_in_the_whole_text_finds(stream, stop):
    """Pieces come one character at a time here, as then the earliest END of a stop text decides, as in a stream."""
    whole = "".join(stream)
    ends = [(whole.index(s) + len(s), whole.index(s)) for s in stop if s in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    text, found = shown(stop, list(whole))
    assert text == expected
    assert (found is not None) == bool(ends)
