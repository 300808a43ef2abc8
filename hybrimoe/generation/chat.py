"""A conversation: messages, the model's chat template, one KV cache for all turns, and a bounded context."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hybrimoe.errors import ModelError, PromptError
from hybrimoe.generation.engine import TextGenerator
from hybrimoe.generation.images.messages import for_template, images_in, text_in, with_images
from hybrimoe.generation.images.reading import ImageFile
from hybrimoe.generation.images.vision import Vision
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.prefix.blocks import PrefixTree
from hybrimoe.generation.profile import Profile
from hybrimoe.generation.reply import Reply
from hybrimoe.generation.sampling import SamplingOptions
from hybrimoe.generation.templates.form import in_the_templates_form
from hybrimoe.generation.templates.limit import time_limit
from hybrimoe.text_files import require_text

__all__ = [
    "Conversation", "Turn", "chat_options", "encode_chat", "has_chat_template", "render_chat", "require_vision",
    "tokenised_chat",
]  # fmt: skip

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models without a chat template: a transcript. Replies end where the model would speak for the user."""

PLAIN_STOP = ("\nUser:", "\nSystem:")

NOT_VARIABLES = frozenset(
    {
        "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "self",
    }
)  # fmt: skip
"""Parameters of `apply_chat_template`: not for a client to set, though templates use some of these names."""

REPLY_ROOM_TOKENS = 256
"""Room that old messages leave for the reply where no length is given."""


class Turn:
    """One user message and its reply; iterate it for the text. `n_dropped`: old messages that no longer fitted.

    before: the history that comes back where the turn fails.
    """

    def __init__(self, conversation: Conversation, reply: Reply, n_dropped: int, before: list[dict[str, Any]]) -> None:
        self.reply = reply
        self.n_dropped = n_dropped
        self._conversation = conversation
        self._before = before

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self.reply
        except Exception:
            self._conversation.messages = self._before  # as if the message had not been sent
            raise
        except BaseException:  # the reader has gone, or Ctrl-C: what there is counts as the reply
            self._answer()
            raise
        self._answer()

    def _answer(self) -> None:
        self._conversation.messages.append({"role": "assistant", "content": self.reply.text})


class Conversation:
    """Messages of a chat with one model. A message that cannot be answered leaves the history as it was.

    prefixes: what earlier messages, their branches and other conversations computed, so that it is not computed again.
    """

    def __init__(
        self, generator: TextGenerator, *, system: str | None = None, prefixes: PrefixTree | None = None
    ) -> None:
        self.generator = generator
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.has_template = has_chat_template(generator.tokenizer)
        self.cache = PrefixCache(generator.model, prefixes)
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.cache.clear()

    def take_up(self, system: str | None, messages: list[dict[str, Any]]) -> None:
        """Go on with the messages of an earlier conversation, its system message among them; nothing is computed.

        The cache stays: it knows its tokens, and the next prompt uses those that it begins with, too.
        """
        self.system = system
        self.messages = messages

    def begin_with(self, system: str | None) -> None:
        """Forget all turns, and begin anew with another system message, or without one.

        Raises ModelError, and changes nothing, where the chat template takes no system message.
        """
        self.check([] if system is None else [{"role": "system", "content": system}])
        self.system = system
        self.reset()

    def check(self, messages: list[dict[str, Any]]) -> None:
        """Raises ModelError where the chat template rejects a conversation that goes on after `messages`."""
        self.encode([*messages, {"role": "user", "content": "Go on."}])

    def undo(self) -> str:
        """Take back the last user message and its reply; returns its text. Raises PromptError where there is none."""
        last = self._last_user()
        text = text_in(self.messages[last])
        self.messages = self.messages[:last]
        return text

    @property
    def last_message(self) -> str:
        """The text of the last user message. Raises PromptError where there is none."""
        return text_in(self.messages[self._last_user()])

    @property
    def n_turns(self) -> int:
        """User messages in the history."""
        return sum(message["role"] == "user" for message in self.messages)

    def send(
        self, text: str, options: SamplingOptions | None = None, *, images: Sequence[ImageFile] = (),
        instead: bool = False, should_stop: Callable[[], bool] = lambda: False, profile: Profile | None = None,
    ) -> Turn:  # fmt: skip
        """Add a user message; the reply is computed while the returned turn is iterated. profile: as in `reply`.

        images: that the message shows before its text. instead: the message takes the place of the last one and of its
        reply; the images of that one stay.

        Raises:
            PromptError: the message is empty, or does not fit the context even without the turns before; or there is
                none that it could take the place of; or the model takes no images.
        """
        if not text.strip():
            raise PromptError("the message is empty: type some text, or /help for the commands")
        options = chat_options(self.generator.tokenizer, options or SamplingOptions())
        last = self._last_user() if instead else len(self.messages)
        earlier, shown = self.messages[:last], [*images_in(self.messages[last : last + 1]), *images]
        messages = [*earlier, {"role": "user", "content": with_images(text, shown)}]
        kept, prompt_ids = self._fit(messages, options)
        reply = self.generator.reply(prompt_ids, options, cache=self.cache, should_stop=should_stop, profile=profile)
        before, self.messages = self.messages, kept
        return Turn(self, reply, len(messages) - len(kept), before)

    def encode(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of `messages`, ready for the assistant's words; see `encode_chat`."""
        return encode_chat(self.generator.tokenizer, messages, vision=self.generator.vision)

    def _last_user(self) -> int:
        """Index of the last user message. Raises PromptError where there is none."""
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]["role"] == "user":
                return index
        raise PromptError("nothing was said yet: send a message first")

    def _fit(self, messages: list[dict[str, Any]], options: SamplingOptions) -> tuple[list[dict[str, Any]], list[int]]:
        """The newest messages that leave room for a reply, and their prompt; the system message always stays."""
        messages = list(messages)
        first = 1 if messages[0]["role"] == "system" else 0
        prompt_ids = self.encode(messages)
        limit = self.generator.context_tokens
        if limit is None:
            return messages, prompt_ids
        room = min(options.max_new_tokens or REPLY_ROOM_TOKENS, limit // 4)
        while len(prompt_ids) + room > limit and len(messages) > first + 1:
            del messages[first : _next_user(messages, first + 1)]
            prompt_ids = self.encode(messages)
        self.generator.check_prompt(len(prompt_ids))
        return messages, prompt_ids


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the model brings a chat template; else conversations are given to it as a plain transcript."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_options(tokenizer: Any, options: SamplingOptions) -> SamplingOptions:
    """The options of a chat reply: a plain transcript ends where the model would speak for the user."""
    return options if has_chat_template(tokenizer) else replace(options, stop=(*options.stop, *PLAIN_STOP))


def encode_chat(
    tokenizer: Any, messages: list[dict[str, Any]], variables: Mapping[str, Any] | None = None,
    vision: Vision | None = None,
) -> list[int]:  # fmt: skip
    """Token ids of `messages` through the model's chat template, ready for the assistant's words; see `render_chat`.

    vision: of the model, for messages with images. Raises PromptError where there are some and it has none.
    """
    images = images_in(messages)
    if not images:
        return tokenised_chat(tokenizer, render_chat(tokenizer, messages, variables))
    seeing = require_vision(vision)
    text = render_chat(tokenizer, messages, variables, placeholder=seeing.placeholder)
    return seeing.encode(text, images, lambda whole: tokenised_chat(tokenizer, whole))


def require_vision(vision: Vision | None) -> Vision:
    """The sight of a model that has some. Raises PromptError where it takes no images."""
    if vision is None:
        raise PromptError("this model takes no images: it was opened for text alone")
    vision.check()
    return vision


def tokenised_chat(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a conversation that `render_chat` gave. Raises PromptError where it is no Unicode."""
    require_text(text, "the message")
    return list(tokenizer(text, add_special_tokens=not has_chat_template(tokenizer))["input_ids"])


def render_chat(
    tokenizer: Any, messages: list[dict[str, Any]], variables: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None, placeholder: str = "",
) -> str:  # fmt: skip
    """`messages` through the model's chat template, ready for the assistant's words.

    messages: role, content as text, and where a client sends them tool_calls, tool_call_id, name, reasoning_content.
    variables: of the template, such as enable_thinking. tools: functions that the template shows to the model.
    placeholder: what stands for an image where the model has no template.

    Raises:
        PromptError: a variable that the template does not have.
        ModelError: the template rejects the conversation, for instance a role that it does not know, or shows nothing
            of its last message.
    """
    with_template = has_chat_template(tokenizer)
    template = str(tokenizer.chat_template) if with_template else PLAIN_TEMPLATE
    _check_variables(template, variables or {})

    def render(given: list[dict[str, Any]]) -> str:
        with time_limit():
            shown: str = tokenizer.apply_chat_template(
                given,
                tools=None if tools is None else list(tools),
                chat_template=None if with_template else PLAIN_TEMPLATE,
                tokenize=False,
                add_generation_prompt=True,
                **(variables or {}),
            )
        return shown

    try:
        shown = [for_template(message, None if with_template else placeholder) for message in messages]
        return render(in_the_templates_form(render, _in_words_of(template, shown)))
    except ModelError:
        raise
    except Exception as error:  # templates are programs of the model's author and raise what they like
        raise ModelError(f"the model's chat template rejects this conversation: {error}") from error


def _check_variables(template: str, variables: Mapping[str, Any]) -> None:
    for name in variables:
        if not name.isidentifier() or name in NOT_VARIABLES or not re.search(rf"\b{name}\b", template):
            raise PromptError(f"the model's chat template has no variable {name!r}; leave it out")


def _in_words_of(template: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without what `template` does not know: a developer speaks as the system, calls of tools and their
    results stand in the text (in the form of Hermes), reasoning has the name that the template gives it.

    A template that does not know them leaves them out without a word.
    """
    known = []
    for message in messages:
        if message["role"] == "developer" and "developer" not in template:
            message = {**message, "role": "system"}
        if "tool_calls" not in template:
            message = _with_calls_as_text(message)
        if "reasoning_content" in message and "reasoning_content" not in template and ".thinking" in template:
            message = {**message, "thinking": message["reasoning_content"]}
        known.append(message)
    return known


def _with_calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool" and isinstance(message["content"], list):
        around = ({"type": "text", "text": text} for text in ("<tool_response>\n", "\n</tool_response>"))
        return {**message, "role": "user", "content": [next(around), *message["content"], next(around)]}
    if message["role"] == "tool":
        result = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {**message, "role": "user", "content": result}
    if not message.get("tool_calls"):
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    shown = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return {**message, "content": "\n".join(part for part in (message["content"], *shown) if part)}


def _next_user(messages: list[dict[str, Any]], start: int) -> int:
    """Index of the first user message at or after `start`; the last message is one."""
    return next(index for index in range(start, len(messages)) if messages[index]["role"] == "user")
