"""Replies of a given structure: which tokens may come next, by the library llguidance (extra `serve`).

A grammar is compiled once for a model's tokenizer. Each reply then has a state of its own, which says before every
token which ones may come, and after it whether the structure has its end. Drafts and batches need nothing more: every
token of every reply is chosen by its own sampler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hybrimoe.errors import HybriMoEError, MissingExtraError

if TYPE_CHECKING:
    import torch

__all__ = ["Constraint", "ConstraintError", "Grammars", "Structure", "StructureKind"]

StructureKind = Literal["json_schema", "regex", "choice", "grammar", "lark"]
MOST_WHITESPACE = 64
"""Characters between two parts of JSON: enough for any indentation, and a weak model cannot go on for ever."""
EXTRA = "serve"
STATE, NO_TOKEN = "<state>", "NoExtensionBias"
"""Of llguidance's messages: what begins the state of its parser, and its word for a place where nothing may come."""
MOST_SAID = 300
"""Characters of its message that are told."""


class ConstraintError(HybriMoEError, ValueError):
    """A structure that no reply can be held to."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What a reply must be.

    kind and source: json_schema, a schema as data; regex, a text; choice, a list of texts; grammar, GBNF or Lark;
    lark, Lark as llguidance extends it (special tokens, JSON schemas within rules). answer: what the rule `@answer` of
    a Lark grammar stands for.
    """

    kind: StructureKind
    source: Any
    answer: Structure | None = None


class Constraint:
    """A compiled structure; `begin` gives a reply its own state."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def begin(self) -> StructuredReply:
        """The state before the first token of a reply."""
        return StructuredReply(self._matcher.deep_copy())


class StructuredReply:
    """How far a reply has come within its structure."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_stopped())

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` [V], float32, with minus infinity for each token that may not come; the given ones stay as they are.

        Raises ConstraintError where the structure has become too complex to follow.
        """
        import torch

        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        n_known = min(len(allowed), logits.shape[-1])
        result = torch.full_like(logits, -torch.inf)
        chosen = allowed[:n_known].nonzero().flatten().to(logits.device)
        result[chosen] = logits[chosen]
        return result

    def accept(self, token: int) -> None:
        """`token` was chosen. Raises ConstraintError as `masked`."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"the structure of the reply cannot be followed: {_why(self._matcher.get_error())}")


class Grammars:
    """Compiles structures for one tokenizer.

    n_vocabulary: tokens that the model gives logits for. eos_token_ids: those that end a reply. Making one takes up to
    a second for a large vocabulary.

    Raises:
        MissingExtraError: llguidance is not installed.
        ConstraintError: llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, n_vocabulary: int, eos_token_ids: Sequence[int]) -> None:
        try:
            import llguidance.hf
        except ImportError as error:
            raise MissingExtraError(EXTRA, f"replies of a given structure: {error}") from error
        n_tokens = max(n_vocabulary, len(tokenizer))
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=n_tokens, eos_token=sorted(eos_token_ids) or None
            )
        except Exception as error:  # llguidance raises plain exceptions about the tokenizer's file
            raise ConstraintError(f"this model's tokenizer gives no structured replies: {error}") from error

    def compile(self, structure: Structure) -> Constraint:
        """The constraint of a structure. Raises ConstraintError, which says what is wrong with it."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _source(structure), log_level=0)
        if matcher.is_error():
            raise ConstraintError(_why(matcher.get_error()))
        return Constraint(matcher)


def in_lark(schema: Mapping[str, Any] | bool) -> str:
    """A JSON schema as part of a Lark rule."""
    return f"%json {json.dumps(_with_whitespace(schema))}"


def _source(structure: Structure) -> str:
    """The grammar in llguidance's own form."""
    if structure.answer is None:
        return json.dumps({"grammars": [_named("", structure)]})
    return json.dumps({"grammars": [_named("", structure), _named("answer", structure.answer)]})


def _named(name: str, structure: Structure) -> dict[str, Any]:
    grammar = {"name": name} if name else {}
    if structure.kind == "json_schema":
        return {**grammar, "json_schema": _with_whitespace(structure.source)}
    return {**grammar, "lark_grammar": _lark(structure)}


def _lark(structure: Structure) -> str:
    from llguidance import regex_to_lark
    from llguidance.gbnf_to_lark import any_to_lark

    if structure.kind == "regex":
        return f"start: /{regex_to_lark(structure.source)}/"
    if structure.kind == "choice":
        return "start: " + " | ".join(json.dumps(text) for text in structure.source)
    if structure.kind == "lark":
        return str(structure.source)
    try:
        return str(any_to_lark(structure.source))
    except Exception as error:  # its parser raises an exception of its own, and IndexError at the text's end
        raise ConstraintError(f"neither GBNF nor Lark: {error}") from error


def _with_whitespace(schema: Mapping[str, Any] | bool) -> Any:
    """The schema with a limit of the whitespace between its parts, where it does not set one itself."""
    if not isinstance(schema, Mapping) or "x-guidance" in schema:
        return schema
    pattern = rf"[\x20\x0A\x0D\x09]{{1,{MOST_WHITESPACE}}}"
    return {**schema, "x-guidance": {"whitespace_pattern": pattern}}


def _why(message: str) -> str:
    """What llguidance says is wrong, without the state of its parser and the grammar, which it puts below."""
    said = " ".join(message.partition(STATE)[0].split())
    if said == NO_TOKEN:
        return "no text follows it: it contradicts itself, or has no end"
    if len(said) > MOST_SAID:
        said = f"{said[:MOST_SAID]}..."
    return said or "it cannot be compiled"
