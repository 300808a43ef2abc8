"""What any API asks of the model, in one form; and how it becomes a prompt, options and a parser of the reply."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import ModelError, PromptError
from hybrimoe.generation import SamplingOptions
from hybrimoe.generation.chat import chat_options, render_chat
from hybrimoe.generation.constraint import Constraint, ConstraintError, Grammars, Structure
from hybrimoe.generation.control_tokens import ControlTokens
from hybrimoe.generation.images.messages import images_in
from hybrimoe.generation.vocabulary import check_token_ids, vocabulary_size
from hybrimoe.server.errors import RequestError
from hybrimoe.server.images import decoded
from hybrimoe.server.infill import infill_tokens
from hybrimoe.server.replies.events import PlainParser, ReplyParser
from hybrimoe.server.replies.syntax import ReplySyntax, ToolUse

if TYPE_CHECKING:
    from hybrimoe.generation import TextGenerator

__all__ = ["ChatAsked", "Preparation", "Prepared", "TextAsked"]

Variables = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatAsked:
    """A reply to a conversation.

    beginning: of the reply, which the model continues.
    answer: the structure of the answer, and `answer_field` the field that asked for it. variables: of the chat
    template. separate_reasoning: False leaves it in the answer, markers and all.
    """

    messages: list[dict[str, Any]]
    options: SamplingOptions
    use: ToolUse = field(default_factory=ToolUse)
    answer: Structure | None = None
    answer_field: str | None = None
    variables: Variables = field(default_factory=dict)
    separate_reasoning: bool = True
    beginning: str = ""

    @property
    def has_images(self) -> bool:
        """Whether the conversation shows images, of which each may take seconds."""
        return bool(images_in(self.messages))


@dataclass(frozen=True, slots=True)
class TextAsked:
    """The continuation of a text, or of tokens. suffix: what stands behind the text that is wanted."""

    prompt: str | Sequence[int]
    options: SamplingOptions
    suffix: str = ""
    answer: Structure | None = None
    answer_field: str | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the generating thread needs, and how the text that comes is read."""

    prompt_ids: list[int]
    options: SamplingOptions
    new_parser: Callable[[], ReplyParser] = PlainParser


class Preparation:
    """Templates, tokens and grammars of one model. Methods take their time and may run side by side.

    tool_parser: see `ReplySyntax.of`, whose errors this raises. special_in_messages: special tokens within messages
    are read as such; else they are text, and nobody can forge the end of a message.
    """

    def __init__(
        self, generator: TextGenerator, tool_parser: str | None = None, *, special_in_messages: bool = False
    ) -> None:
        self._generator = generator
        self._control = ControlTokens(generator.tokenizer)
        self._mark: Callable[[Any], Any] = (lambda value: value) if special_in_messages else self._control.mark
        self.syntax = ReplySyntax.of(generator.tokenizer, tool_parser)
        self._grammars: Grammars | None = None
        self._making = threading.Lock()

    def text(self, asked: TextAsked) -> Prepared:
        """Raises RequestError, PromptError for what cannot be honoured."""
        ids = self._between(asked) if asked.suffix else self._tokens(asked.prompt)
        self._check_token_ids("prompt", ids)
        return Prepared(ids, self._held_to(asked.options, asked.answer, asked.answer_field))

    def chat(self, asked: ChatAsked) -> Prepared:
        """Raises RequestError, PromptError for what cannot be honoured."""
        prompt, ids = self.prompt(asked)
        syntax, tokenizer = self.syntax, self._generator.tokenizer
        structure = syntax.structure(prompt, asked.use, asked.answer)
        about = asked.answer_field if asked.answer is not None else "tools"
        options = self._held_to(chat_options(tokenizer, asked.options), structure, about)
        options = replace(options, shown_special=syntax.shown_special)
        reader = syntax if asked.separate_reasoning else replace(syntax, thinking=None)
        return Prepared(ids, options, lambda: reader.parser(prompt, asked.use))

    def prompt(self, asked: ChatAsked) -> tuple[str, list[int]]:
        """The conversation as the model is given it: text and tokens."""
        tokenizer, syntax, mark = self._generator.tokenizer, self.syntax, self._mark
        vision = self._generator.vision
        images = decoded(asked.messages, vision)
        placeholder = "" if vision is None or not images else vision.placeholder
        messages = mark(syntax.instructed(asked.messages, asked.use))
        try:
            text = render_chat(
                tokenizer, messages, mark(asked.variables), mark(syntax.template_tools(asked.use)), placeholder
            )
        except ModelError as error:  # the template's own words about a conversation that it cannot render
            raise RequestError(str(error), "messages") from error
        text += mark(asked.beginning)
        if not images:
            return self._control.shown(text), self._control.encode(text)
        assert vision is not None
        return self._control.shown(text), vision.encode(text, images, self._control.encode)

    @property
    def sees(self) -> bool:
        """Whether the model takes images."""
        return self._generator.vision is not None and self._generator.vision.reason is None

    def takes(self, variable: str) -> bool:
        """Whether the model's chat template has a variable of this name."""
        template = str(getattr(self._generator.tokenizer, "chat_template", None) or "")
        return re.search(rf"\b{variable}\b", template) is not None

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        return self._generator.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _between(self, asked: TextAsked) -> list[int]:
        """Tokens that ask for what stands between the prompt and the suffix."""
        if not isinstance(asked.prompt, str):
            raise RequestError("suffix: needs a prompt that is a text, found tokens", "prompt")
        return infill_tokens(self._generator.tokenizer, asked.prompt, asked.suffix)

    def _held_to(self, options: SamplingOptions, structure: Structure | None, about: str | None) -> SamplingOptions:
        self._check_token_ids("logit_bias", [token for token, _ in options.logit_bias])
        if structure is None:
            return options
        try:
            return replace(options, constraint=self._compiled(structure))
        except ConstraintError as error:
            raise RequestError(f"{about}: {error}" if about else str(error), about) from error

    def _compiled(self, structure: Structure) -> Constraint:
        with self._making:
            if self._grammars is None:
                model, tokenizer = self._generator.model, self._generator.tokenizer
                ends = model.generation_config.eos_token_id
                ids = [ends] if isinstance(ends, int) else list(ends or [])
                self._grammars = Grammars(tokenizer, vocabulary_size(model), ids)
        return self._grammars.compile(structure)

    def _check_token_ids(self, where: str, ids: Sequence[int]) -> None:
        try:
            check_token_ids(self._generator.model, ids, what=where)
        except PromptError as error:
            raise RequestError(str(error), where) from error
