"""A conversation: messages, the model's chat template, one KV cache for all turns, and a bounded context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from hybrimoe.errors import ModelError, PromptError
from hybrimoe.generation.engine import Reply, TextGenerator
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.sampling import DEFAULT_NEW_TOKENS, SamplingOptions

__all__ = ["Conversation", "Turn"]

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models without a chat template: a transcript. Replies end where the model would speak for the user."""

PLAIN_STOP = ("\nUser:", "\nSystem:")


class Turn:
    """One user message and its reply; iterate it for the text. `n_dropped`: old messages that no longer fitted."""

    def __init__(self, conversation: Conversation, reply: Reply, n_dropped: int) -> None:
        self.reply = reply
        self.n_dropped = n_dropped
        self._conversation = conversation

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self.reply
        except Exception:
            self._conversation.messages.pop()  # the user message stays unanswered: as if it had not been sent
            raise
        except BaseException:  # the reader has gone, or Ctrl-C: what there is counts as the reply
            self._answer()
            raise
        self._answer()

    def _answer(self) -> None:
        self._conversation.messages.append({"role": "assistant", "content": self.reply.text})


class Conversation:
    """Messages of a chat with one model. A message that cannot be answered leaves the history as it was."""

    def __init__(self, generator: TextGenerator, *, system: str | None = None) -> None:
        self.generator = generator
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.has_template = bool(getattr(generator.tokenizer, "chat_template", None))
        self._cache = PrefixCache(generator.model)
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._cache.clear()

    @property
    def n_turns(self) -> int:
        """User messages in the history."""
        return sum(message["role"] == "user" for message in self.messages)

    def send(
        self, text: str, options: SamplingOptions | None = None, *, should_stop: Callable[[], bool] = lambda: False
    ) -> Turn:
        """Add a user message; the reply is computed while the returned turn is iterated.

        Raises:
            PromptError: the message is empty, or does not fit the context even without the turns before.
        """
        if not text.strip():
            raise PromptError("the message is empty: type some text, or /help for the commands")
        options = self._with_plain_stops(options or SamplingOptions())
        messages = [*self.messages, {"role": "user", "content": text}]
        kept, prompt_ids = self._fit(messages, options)
        reply = self.generator.reply(prompt_ids, options, cache=self._cache, should_stop=should_stop)
        self.messages = kept
        return Turn(self, reply, len(messages) - len(kept))

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of `messages` through the model's chat template, ready for the assistant's words."""
        template = None if self.has_template else PLAIN_TEMPLATE
        tokenizer: Any = self.generator.tokenizer
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs of the model's author and raise what they like
            raise ModelError(f"the model's chat template rejects this conversation: {error}") from error
        return list(tokenizer(text, add_special_tokens=not self.has_template)["input_ids"])

    def _fit(self, messages: list[dict[str, str]], options: SamplingOptions) -> tuple[list[dict[str, str]], list[int]]:
        """The newest messages that leave room for a reply, and their prompt; the system message always stays."""
        messages = list(messages)
        first = 1 if messages[0]["role"] == "system" else 0
        prompt_ids = self.encode(messages)
        limit = self.generator.context_tokens
        if limit is None:
            return messages, prompt_ids
        room = min(options.max_new_tokens or DEFAULT_NEW_TOKENS, limit // 4)
        while len(prompt_ids) + room > limit and len(messages) > first + 1:
            del messages[first : _next_user(messages, first + 1)]
            prompt_ids = self.encode(messages)
        self.generator.check_prompt(len(prompt_ids))
        return messages, prompt_ids

    def _with_plain_stops(self, options: SamplingOptions) -> SamplingOptions:
        if self.has_template:
            return options
        return replace(options, stop=(*options.stop, *PLAIN_STOP))


def _next_user(messages: list[dict[str, str]], start: int) -> int:
    """Index of the first user message at or after `start`; the last message is one."""
    return next(index for index in range(start, len(messages)) if messages[index]["role"] == "user")
