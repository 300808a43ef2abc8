import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hybrimoe.demo.training.data import encode_stream, token_byte_lengths
from hybrimoe.demo.training.tokenizer import BOS, EOS, PAD, train_tokenizer

TOKENIZER = train_tokenizer(["some words, some more words"], vocab_size=280, max_tokens=32)


@settings(deadline=None, max_examples=60)
@given(st.text())
def test_every_text_comes_back_from_its_ids(text):
    ids = TOKENIZER(text, verbose=False)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["", "naïve — 漢字 🙂\u200d🚀", "a\u00a0b\r\n\t  c ", "'s don't 12345"])
def test_unicode_and_white_space_come_back(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text


def test_all_256_bytes_are_tokens():
    lengths = token_byte_lengths(TOKENIZER)
    single = [
        token
        for token, length in zip(TOKENIZER.convert_ids_to_tokens(range(280)), lengths, strict=False)
        if length == 1
    ]
    assert len(single) == 256
    assert len(TOKENIZER) <= 280


def test_token_bytes_add_up_to_the_text():
    text = "some words — naïve 🙂"
    lengths = token_byte_lengths(TOKENIZER)
    assert sum(lengths[TOKENIZER(text)["input_ids"]]) == len(text.encode())


def test_special_tokens_are_the_first_ids_and_are_never_made_from_text_pieces():
    assert TOKENIZER.convert_tokens_to_ids([BOS, EOS, PAD]) == [0, 1, 2]
    assert list(token_byte_lengths(TOKENIZER)[:3]) == [0, 0, 0]


def test_streams_frame_each_document():
    stream = encode_stream(["some", "words"], TOKENIZER)
    assert TOKENIZER.decode(stream) == f"{BOS}some{EOS}{BOS}words{EOS}"
    assert len(encode_stream([], TOKENIZER)) == 0


def test_chat_template_continues_text(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": "It is"},
        {"role": "assistant", "content": " a truth."},
        {"role": "user", "content": "And"},
    ]
    assert loaded.apply_chat_template(messages, tokenize=False) == f"{BOS}It is a truth.\n\nAnd"
    assert loaded("some words")["input_ids"] == TOKENIZER("some words")["input_ids"]
