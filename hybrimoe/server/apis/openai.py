"""What OpenAI's two older endpoints share: sampling, structure of the answer, token counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import TypedDict

from hybrimoe.errors import ConfigError
from hybrimoe.generation import SamplingOptions
from hybrimoe.generation.constraint import Structure, StructureKind
from hybrimoe.server.errors import RequestError
from hybrimoe.server.fields import (
    Biases,
    Boolean,
    Free,
    Integer,
    NoLimit,
    Penalty,
    Priority,
    Refused,
    Repetition,
    Seconds,
    Seed,
    Share,
    StopText,
    StopTexts,
    Strict,
    Temperature,
    Text,
    Tokens,
    TopK,
    length_of,
    seed_of,
)
from hybrimoe.server.forms import Ended
from hybrimoe.server.replies.events import parsed_json

__all__ = ["REFUSED", "UNUSED", "Sampling", "Usage", "choice_options", "json_schema_answer", "usage"]

MOST_CHOICES = 16
"""Replies to one prompt; each needs a place of its own."""

UNUSED = {
    "user": "who asks",
    "safety_identifier": "who asks",
    "metadata": "for the client's own use",
    "prompt_cache_key": "every prompt's beginning is looked up in the cache",
    "prompt_cache_retention": "every prompt's beginning is looked up in the cache",
    "cache_prompt": "every prompt's beginning is looked up in the cache",
}
"""Fields that change nothing about a reply, and why."""

REFUSED: Refused = {
    "functions": ("functions; send tools", ([],)),
    "function_call": ("functions; send tools and tool_choice", ("none", "auto")),
    "modalities": ("replies that are no text", (["text"],)),
    "audio": ("audio", ()),
    "prediction": ("predicted replies", ()),
    "web_search_options": ("web search", ()),
    "verbosity": ("a verbosity", ("medium",)),
    "store": ("storing replies", (False,)),
    "service_tier": ("service tiers", ("auto", "default")),
    "use_beam_search": ("beam search", (False,)),
    "typical_p": ("typical sampling", (1, 1.0)),
    "mirostat": ("Mirostat", (0,)),
    "dry_multiplier": ("DRY", (0, 0.0)),
    "xtc_probability": ("XTC", (0, 0.0)),
    "lora": ("adapters", ([],)),
}


class StreamOptions(Strict):
    """What a stream holds beside the text."""

    refused: ClassVar[Refused] = {"include_obfuscation": ("obfuscation", (False,))}

    include_usage: Boolean | None = Field(default=None, description="End with a piece that holds the token counts.")


class JsonSchemaFormat(Strict):
    """The schema of an answer, with a name that is for the client's own use."""

    name: Text | None = None
    description: Text | None = None
    schema_: Free | None = Field(default=None, alias="schema")
    strict: Boolean | None = Field(default=None, description="The answer follows the schema in any case.")


class ResponseFormat(Strict):
    """The form of an answer. schema: of a json_object, as llama-server and others take it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Free | None = Field(default=None, alias="schema")

    def structure(self) -> Structure | None:
        """What the answer must be. Raises RequestError."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return json_schema_answer(self.schema_)
        if self.json_schema is None:
            raise RequestError("response_format: json_schema needs the field json_schema", "response_format")
        return json_schema_answer(self.json_schema.schema_)


class StructuredOutputs(Strict):
    """vLLM's form: one of them."""

    json_: Free | Text | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None
    json_object: Boolean | None = None


class Sampling(Strict):
    """What completions and chat share. null means: as the model's generation_config.json says."""

    refused: ClassVar[Refused] = REFUSED

    model: Text | None = None
    max_tokens: Tokens | NoLimit | None = Field(
        default=None, description="null or -1: until the end of the text or of the context."
    )
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: Repetition | None = None
    repeat_penalty: Repetition | None = Field(default=None, description="As repetition_penalty (llama-server).")
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Biases | None = Field(default=None, description="Token id to what is added to its logit.")
    seed: Seed | None = None
    n: Integer | None = Field(default=None, ge=1, le=MOST_CHOICES, description="Replies to each prompt.")
    stop: StopText | StopTexts | None = None
    ignore_eos: Boolean | None = None
    stream: Boolean | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    json_schema: Free | None = Field(default=None, description="Schema of the answer (llama-server).")
    grammar: Text | None = Field(default=None, description="Grammar of the answer: GBNF or Lark.")
    guided_json: Free | Text | None = Field(default=None, description="Schema of the answer (vLLM).")
    guided_regex: Text | None = Field(default=None, description="Regular expression of the answer (vLLM).")
    guided_choice: list[Text] | None = Field(default=None, description="The answer is one of them (vLLM).")
    guided_grammar: Text | None = Field(default=None, description="As grammar (vLLM).")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="As the guided ones (vLLM).")
    priority: Priority | None = Field(default=None, description="A lower one comes first; 0 where none is sent.")
    max_reply_seconds: Seconds | None = Field(
        default=None, description="The reply ends so long after the request came, with stop_reason: deadline."
    )
    id_slot: Integer | None = Field(
        default=None, description="The slot in which the reply is computed (llama-server); -1: the server chooses."
    )
    user: Text | None = Field(default=None, description=UNUSED["user"])
    safety_identifier: Text | None = Field(default=None, description=UNUSED["safety_identifier"])
    metadata: Free | None = Field(default=None, description=UNUSED["metadata"])
    prompt_cache_key: Text | None = Field(default=None, description=UNUSED["prompt_cache_key"])
    prompt_cache_retention: Text | None = Field(default=None, description=UNUSED["prompt_cache_retention"])
    cache_prompt: Boolean | None = Field(default=None, description=UNUSED["cache_prompt"])

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a piece that holds the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def longest_reply(self) -> int | None:
        """Tokens of the reply at most."""
        return length_of(self.max_tokens)

    @property
    def n_top_logprobs(self) -> int | None:
        """Alternatives whose log probability is told; None where none is recorded."""
        return None

    def options(self) -> SamplingOptions:
        """As the generator takes them. Raises RequestError for values that do not go together."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        penalty = self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty
        try:
            return SamplingOptions(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=penalty,
                frequency_penalty=self.frequency_penalty or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
                logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
                seed=seed_of(self.seed),
                stop=stop,
                max_new_tokens=self.longest_reply,
                ignore_eos=bool(self.ignore_eos),
                top_logprobs=self.n_top_logprobs,
            )
        except ConfigError as error:
            raise RequestError(str(error)) from error

    def answer(self) -> tuple[Structure | None, str | None]:
        """What the answer must be, and the field that says so. Raises RequestError where several do."""
        found = {field: structure for field, structure in self._structures().items() if structure is not None}
        if len(found) > 1:
            raise RequestError(
                f"{' and '.join(found)}: an answer has one structure; send one of them", next(iter(found))
            )
        return next(((structure, field) for field, structure in found.items()), (None, None))

    def _structures(self) -> dict[str, Structure | None]:
        said, outputs = self.response_format, self.structured_outputs
        structures = {
            "response_format": None if said is None else said.structure(),
            "json_schema": json_schema_answer(self.json_schema) if self.json_schema else None,
            "grammar": _of("grammar", self.grammar or None),
            "guided_json": _of("json_schema", self.guided_json),
            "guided_regex": _of("regex", self.guided_regex),
            "guided_choice": _of("choice", self.guided_choice or None),
            "guided_grammar": _of("grammar", self.guided_grammar or None),
        }
        if outputs is not None:
            structures |= {
                "structured_outputs.json": _of("json_schema", outputs.json_),
                "structured_outputs.regex": _of("regex", outputs.regex),
                "structured_outputs.choice": _of("choice", outputs.choice or None),
                "structured_outputs.grammar": _of("grammar", outputs.grammar or None),
                "structured_outputs.json_object": json_schema_answer(None) if outputs.json_object else None,
            }
        return structures


class PromptDetails(TypedDict):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts of an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def usage(replies: Sequence[Ended], n_per_prompt: int = 1) -> Usage:
    """Token counts of all replies; a prompt counts once, however many replies it has."""
    prompts = replies[::n_per_prompt]
    n_prompt, n_new = sum(one.n_prompt for one in prompts), sum(one.n_new for one in replies)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": sum(one.reply.n_reused for one in prompts)},
    }


def choice_options(options: SamplingOptions, n: int) -> list[SamplingOptions]:
    """Options of n replies to one prompt: each has a seed of its own, so that they differ."""
    first = options if n == 1 else options.with_seed()
    return [replace(first, seed=None if first.seed is None else (first.seed + k) % 2**63) for k in range(n)]


def json_schema_answer(schema: Mapping[str, Any] | None) -> Structure:
    """JSON by a schema; any object where there is none."""
    return Structure("json_schema", {"type": "object"} if schema is None else schema)


def _of(kind: StructureKind, source: Any) -> Structure | None:
    if source is None:
        return None
    if kind != "json_schema" or not isinstance(source, str):
        return Structure(kind, source)
    schema = parsed_json(source)
    if not isinstance(schema, dict):
        raise RequestError("expected a JSON schema, as an object or as its text", "guided_json")
    return Structure(kind, schema)
