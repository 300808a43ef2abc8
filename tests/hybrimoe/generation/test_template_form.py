"""Messages reach chat templates in the form that the template reads; words are never left out in silence."""

from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerFast

from hybrimoe.errors import ModelError
from hybrimoe.generation import encode_chat

END = "{% if add_generation_prompt %}<assistant>{% endif %}"
PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}" + END
)
FIRST_PART = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'][0]['text'] }}{% endfor %}" + END
TEXT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}" + END
EITHER = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}PART:{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}" + END
)
SYSTEM_TEXT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'system' %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}" + END
)
STRICT_PARTS = (
    "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('lists of parts only') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'][0]['text'] }}{% endfor %}" + END
)
NEITHER = "{% for m in messages %}<{{ m['role'] }}>{% endfor %}" + END
LAST_ONLY = "<{{ messages[-1]['role'] }}>{{ messages[-1]['content'] }}" + END
STRICT_ROLES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEXT

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello {{ messages }}"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "And you?"},
]
EXPECTED = "<system>Be brief.<user>Hello {{ messages }}<assistant>Hi<user>And you?<assistant>"


@pytest.fixture
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> Iterator[PreTrainedTokenizerFast]:
    before = byte_tokenizer.chat_template
    yield byte_tokenizer
    byte_tokenizer.chat_template = before


def shown(tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict[str, str]]) -> str:
    tokenizer.chat_template = template
    return str(tokenizer.decode(encode_chat(tokenizer, messages)))


@pytest.mark.parametrize("template", [PARTS, FIRST_PART, TEXT, EITHER, SYSTEM_TEXT, STRICT_PARTS])
def test_every_word_arrives(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    assert shown(tokenizer, template, CONVERSATION) == EXPECTED


@pytest.mark.parametrize("template", [PARTS, STRICT_PARTS, TEXT])
def test_content_that_is_no_text_stays(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    parts = [{"type": "text", "text": "Hello"}]
    messages = [{"role": "user", "content": parts if template != TEXT else "Hello"}]
    assert shown(tokenizer, template, messages) == "<user>Hello<assistant>"


def test_a_template_may_leave_earlier_messages_out(tokenizer: PreTrainedTokenizerFast) -> None:
    assert shown(tokenizer, LAST_ONLY, CONVERSATION) == "<user>And you?<assistant>"


def test_a_template_that_leaves_the_last_message_out_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="leaves the last message out"):
        shown(tokenizer, NEITHER, CONVERSATION)


def test_what_a_template_rejects_is_said_in_its_words(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="rejects this conversation: no system role"):
        shown(tokenizer, STRICT_ROLES, CONVERSATION)
