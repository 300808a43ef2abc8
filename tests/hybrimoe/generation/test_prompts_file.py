"""Prompts of a batched job from text: formats, fields, and what is refused."""

import pytest

from hybrimoe.errors import PromptError
from hybrimoe.generation.batch.prompts_file import PromptLine, read_prompts


def test_one_prompt_a_line_and_empty_lines_are_skipped():
    text = 'first\n\n  \n{"prompt": "not JSON Lines in a .txt"}\n last '
    assert read_prompts(text, "p.txt") == [
        PromptLine(1, "first"), PromptLine(4, '{"prompt": "not JSON Lines in a .txt"}'), PromptLine(5, " last "),
    ]  # fmt: skip


def test_json_lines_have_level_deadline_and_length():
    text = '{"prompt": "a"}\n{"prompt": "b", "id": "x", "priority": 2, "deadline_ms": 1.5, "max_new_tokens": 7}\n'
    expected = [PromptLine(1, "a"), PromptLine(2, "b", "x", 2, 1.5, 7)]
    assert read_prompts(text, "p.jsonl") == expected
    assert read_prompts(text, "-") == expected, "stdin: an object in the first line"
    assert [line.text for line in read_prompts("{ not JSON\n", "-")] == ["{ not JSON"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "p.jsonl:2: expected a JSON object"),
        ("[1]", '"prompt"'),
        ('{"text": "a"}', '"prompt"'),
        ('{"prompt": "  "}', '"prompt"'),
        ('{"prompt": 3}', '"prompt"'),
        ('{"prompt": "a", "prioritty": 1}', "did you mean 'priority'"),
        ('{"prompt": "a", "priority": 1.5}', "priority must be an integer"),
        ('{"prompt": "a", "priority": true}', "priority must be an integer"),
        ('{"prompt": "a", "deadline_ms": 0}', "deadline_ms must be a number of ms above 0"),
        ('{"prompt": "a", "deadline_ms": NaN}', "deadline_ms must be"),
        ('{"prompt": "a", "deadline_ms": "1s"}', "deadline_ms must be"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens must be"),
        ('{"prompt": "a", "id": [1]}', "id must be"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(line, words):
    with pytest.raises(PromptError) as error:
        read_prompts('{"prompt": "fine"}\n' + line, "p.jsonl")
    assert words in str(error.value)
    assert "p.jsonl:2" in str(error.value)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_prompts_are_refused(text):
    with pytest.raises(PromptError, match="stdin has no prompts"):
        read_prompts(text, "-")
