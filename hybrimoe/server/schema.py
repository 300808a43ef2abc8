"""Requests of the OpenAI API, as far as they can be honoured; what cannot is refused instead of being ignored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hybrimoe.generation import SamplingOptions

IGNORED = frozenset({"user", "stream_options", "store", "metadata", "service_tier", "parallel_tool_calls"})
"""Keys of the API that change nothing here."""

REFUSED = {
    "tools": "tool calls",
    "functions": "function calls",
    "logprobs": "log probabilities",
    "logit_bias": "a logit bias",
    "suffix": "text insertion",
    "best_of": "several candidates",
}


class Sampling(BaseModel):
    """What completions and chat share. None means: as the model's generation_config.json says."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, gt=0.0)
    seed: int | None = Field(default=None, ge=0)
    stop: str | list[str] | None = None
    n: Literal[1] = 1
    stream: bool = False

    @model_validator(mode="after")
    def _refuse_what_cannot_be_done(self) -> Sampling:
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED and value not in (None, [], {}, False, 0, 1):
                raise ValueError(f"{name}: this server has no support for {REFUSED[name]}")
            if name == "response_format" and isinstance(value, dict) and value.get("type", "text") != "text":
                raise ValueError("response_format: this server only replies with text")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a piece that holds the token counts."""
        options = (self.model_extra or {}).get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    def options(self) -> SamplingOptions:
        """As the generator takes them. Raises ConfigError for an empty stop text."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=stop,
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
        )


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int]

    def single_prompt(self) -> str | list[int]:
        """The one prompt. Raises ValueError for several."""
        if isinstance(self.prompt, str) or not self.prompt:
            return self.prompt if isinstance(self.prompt, str) else ""
        if isinstance(self.prompt[0], str):
            if len(self.prompt) > 1:
                raise ValueError(f"prompt: expected one prompt, found {len(self.prompt)}; send a request for each")
            return self.prompt[0]
        return [int(token) for token in self.prompt]


class Message(BaseModel):
    """One message of a chat; content in parts must be text."""

    role: str
    content: str | list[dict[str, Any]]

    def text(self) -> str:
        """The words. Raises ValueError for a part that is no text."""
        if isinstance(self.content, str):
            return self.content
        other = sorted({str(part.get("type")) for part in self.content} - {"text"})
        if other:
            raise ValueError(f"messages: expected text content, found {', '.join(other)}")
        return "".join(str(part.get("text", "")) for part in self.content)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)

    def plain_messages(self) -> list[dict[str, str]]:
        """Messages as chat templates take them."""
        return [{"role": message.role, "content": message.text()} for message in self.messages]
