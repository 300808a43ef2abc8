"""Chat templates differ in what a message's content is to them: a text, or a list of parts of which some are text.

A template that loops over parts finds none in a text, and leaves the user's words out without an error. So the
conversation is rendered once with marks in place of its texts, to see which of them arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

from hybrimoe.errors import ModelError

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
"""What a template raises on its own account, and what its expressions raise on values of another type."""

Message = dict[str, Any]
Render = Callable[[list[Message]], str]


def in_the_templates_form(render: Render, messages: Sequence[Message]) -> list[Message]:
    """`messages` with each text content as it is, or as a list of one text part where the template reads only that.

    render: the chat template, from messages to text; what it raises in both forms goes on.
    Raises ModelError where the last message is left out in either form.
    """
    texts = [index for index, message in enumerate(messages) if _is_text(message.get("content"))]
    try:
        missing = _left_out(render, messages, texts, as_parts=())
    except TEMPLATE_ERRORS as rejected:
        missing = texts
        try:
            still_missing = _left_out(render, messages, texts, as_parts=texts)
        except TEMPLATE_ERRORS:
            raise rejected from None
    else:
        still_missing = _left_out(render, messages, texts, as_parts=missing) if missing else []
    if still_missing and still_missing[-1] == len(messages) - 1:
        raise ModelError(
            "the model's chat template leaves the last message out, given as a text and as a list of parts;"
            " use plain prompts (hybrimoe generate), or give the model folder another chat_template"
        )
    found = set(missing) - set(still_missing)
    return [_in_parts(message) if index in found else message for index, message in enumerate(messages)]


def _left_out(render: Render, messages: Sequence[Message], texts: Sequence[int], as_parts: Sequence[int]) -> list[int]:
    """Which of `texts` (indices of messages) do not arrive where those of `as_parts` are given as lists of parts."""
    marked = [{**message, "content": _mark(i)} if i in texts else message for i, message in enumerate(messages)]
    shown = render([_in_parts(message) if index in as_parts else message for index, message in enumerate(marked)])
    return [index for index in texts if _mark(index) not in shown]


def _is_text(content: Any) -> bool:
    return isinstance(content, str) and bool(content.strip())


def _mark(index: int) -> str:
    return f"hybrimoe-message-{index}-here"


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
