"""The measurement behind `hybrimoe bench needle`: whether a model finds one sentence in a long text.

A sentence with a secret word stands at some depth of a text, which ends with the beginning of that sentence once more.
What is looked at is the word that belongs next. Small models that answer no question about a text can do that, and the
word's rank and probability say more than found or not. The same text without the sentence shows what the word has by
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrimoe.bench.quality.text import quality_text
from hybrimoe.config.deploy import DeployConfig
from hybrimoe.errors import ConfigError, ModelError
from hybrimoe.generation.context import model_context_tokens
from hybrimoe.machine.facts import machine

WORDS = ("elephant", "violet", "hammer", "lemon", "castle")
"""Secret words; each depth has one, the first again after the last."""
QUESTION = "\n\nThe secret word is"
NEEDLE = QUESTION + " {word}. Remember it.\n\n"


@dataclass(frozen=True, slots=True)
class Request:
    """One command line of `bench needle`. deployments: of one model, by the dtype of keys and values.

    contexts: tokens of a whole text, the question included. depths: 0 is its beginning, 1 its end. text: None is the
    held-out text beside the model, else its card; it is repeated where it is too short.
    """

    deployments: dict[str, DeployConfig]
    contexts: tuple[int, ...]
    depths: tuple[float, ...]
    text: Path | None


def measure(request: Request, progress: Callable[[int, int, str], None]) -> dict[str, Any]:
    """A row for each dtype, context and depth: the word, its rank (1: the model's own choice) and probability, and both
    without the sentence. Of a word of several tokens the first one counts.

    Raises ConfigError for a context that the model does not have, or that has no room for the sentence; ModelError
    where there is no text.
    """
    rows: list[dict[str, Any]] = []
    total = len(request.deployments) * len(request.contexts)
    told: dict[str, Any] = {}
    for name, deployment in request.deployments.items():
        hunt = _Hunt.open(deployment, request)
        try:
            for context in request.contexts:
                progress(len(rows) // len(request.depths), total, f"{context} tokens, keys and values {name}")
                rows += [{"kv_dtype": name, "context": context, **row} for row in hunt.rows(context, request.depths)]
        finally:
            hunt.close()
        rope = None if deployment.rope is None else deployment.rope.model_dump(mode="json", exclude_none=True)
        told = {"model": deployment.model or "demo", "model_context": hunt.limit, "text": hunt.source, "rope": rope}
    progress(total, total, "asked")
    return {"bench": "needle", **told, "machine": machine(), "rows": rows}


@dataclass(frozen=True, slots=True)
class _Hunt:
    """A loaded model, and the tokens of the text that hides the sentence."""

    generator: Any
    cache: Any
    hay: list[int]
    source: str
    limit: int | None

    @classmethod
    def open(cls, deployment: DeployConfig, request: Request) -> _Hunt:
        from hybrimoe.checkpoint import load, load_tokenizer
        from hybrimoe.generation import PrefixCache, TextGenerator

        model: Any = load(config=deployment, progress=False)
        try:
            limit, longest = model_context_tokens(model.config), max(request.contexts)
            if limit is not None and longest > limit:
                raise ConfigError(
                    f"--context {longest}: the model's context is {limit} tokens; ask for at most those, or"
                    " stretch it (--rope-scaling yarn --rope-scale 2)"
                )
            source, text = quality_text(Path(model.config._name_or_path), request.text)
            tokenizer = load_tokenizer(deployment.model)
            hay = tokenizer(text, verbose=False)["input_ids"]
            if not hay:
                raise ModelError(f"{source} has no text; name another one with --text")
        except BaseException:
            model.hybrimoe.session.close()
            raise
        return cls(TextGenerator(model, tokenizer), PrefixCache(model), hay, source, limit)

    def close(self) -> None:
        self.generator.model.hybrimoe.session.close()

    def rows(self, context: int, depths: Sequence[float]) -> list[dict[str, Any]]:
        """One of each depth. They are computed from the deepest on: the cache keeps what texts share."""
        words = [WORDS[index % len(WORDS)] for index in range(len(depths))]
        without = self._logits(self._text(context))
        found = {}
        for index in sorted(range(len(depths)), key=lambda index: -depths[index]):
            token = self._first_token(words[index])
            rank, probability = _place(self._logits(self._text(context, depths[index], words[index])), token)
            found[index] = {
                "depth": depths[index], "word": words[index], "rank": rank, "probability": probability,
                "rank_without": _place(without, token)[0], "probability_without": _place(without, token)[1],
            }  # fmt: skip
        return [found[index] for index in range(len(depths))]

    def _text(self, context: int, depth: float = 1.0, word: str | None = None) -> list[int]:
        """`context` tokens, with the sentence at `depth` where there is a word. Raises ConfigError without room."""
        needle, question = [] if word is None else self._ids(NEEDLE.format(word=word)), self._ids(QUESTION)
        room = context - len(needle) - len(question)
        if room < 1:
            raise ConfigError(f"--context {context}: the sentence alone takes {context - room} tokens; ask for more")
        hay = (self.hay * (room // len(self.hay) + 1))[:room]
        at = max(1, round(depth * room))  # behind the token that begins a text
        return [*hay[:at], *needle, *hay[at:], *question]

    def _first_token(self, word: str) -> int:
        """The token that follows the question where the word does."""
        return self._ids(f"{QUESTION} {word}")[len(self._ids(QUESTION))]

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.generator.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _logits(self, token_ids: list[int]) -> torch.Tensor:
        held = self.cache.reuse(token_ids)
        logits: torch.Tensor = self.generator.forward(token_ids[held:], self.cache)
        return logits.float().cpu()


def _place(logits: torch.Tensor, token: int) -> tuple[int, float]:
    """Rank (from 1) and probability of a token by logits [V]."""
    return int((logits > logits[token]).sum()) + 1, float(logits.softmax(0)[token])
