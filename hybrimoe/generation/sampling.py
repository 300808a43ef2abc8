"""Sampling options and the choice of the next token, with transformers' own processors in transformers' own order."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import ConfigError
from hybrimoe.generation.candidates import few_candidates

if TYPE_CHECKING:
    import torch

__all__ = ["Sampler", "SamplingOptions"]

DEFAULT_NEW_TOKENS = 256
"""Length of a reply when neither the caller nor the model's generation_config.json sets one."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to choose tokens and when to stop. None means: as the model's generation_config.json says.

    temperature: 0 is greedy. Any of temperature, top_p, top_k, min_p given (and temperature not 0) samples.
    top_p, min_p: in [0, 1]. top_k: 0 switches it off. repetition_penalty: > 0, 1 switches it off.
    seed: of the generator that samples; None draws one, which the reply's summary tells.
    stop: texts that end the reply; they are not part of it.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, math.inf, "0 is greedy, 1 leaves the probabilities as they are")
        _in_range("top_p", self.top_p, 0.0, 1.0, "the share of probability that is kept")
        _in_range("top_k", self.top_k, 0, math.inf, "a number of tokens; 0 switches it off")
        _in_range("min_p", self.min_p, 0.0, 1.0, "a share of the largest probability")
        _in_range("max_new_tokens", self.max_new_tokens, 1, math.inf, "a number of tokens")
        _in_range("seed", self.seed, 0, 2**63 - 1, "an integer")
        if self.repetition_penalty is not None and not 0.0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty must be above 0 (1 switches it off), found {self.repetition_penalty}"
            )
        if any(not text for text in self.stop):
            raise ConfigError("an empty stop text would end every reply at once; leave it out")

    @property
    def samples(self) -> bool | None:
        """True: draw; False: greedy; None: as the model's generation config says."""
        if self.temperature is not None:
            return self.temperature > 0.0
        given = (self.top_p, self.top_k, self.min_p)
        return True if any(value is not None for value in given) else None

    def generation_kwargs(self) -> dict[str, Any]:
        """These options as keyword arguments of `model.generate` (without seed and stop texts)."""
        kwargs: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        samples = self.samples
        if samples is not None:
            kwargs["do_sample"] = samples
        if samples is not False:
            kwargs |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return {name: value for name, value in kwargs.items() if value is not None}

    def with_seed(self) -> SamplingOptions:
        """These options with a seed that is known: drawn by the operating system where none was given."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))


def _in_range(name: str, value: float | None, low: float, high: float, meaning: str) -> None:
    if value is not None and not low <= value <= high:
        limits = f"at least {low}" if math.isinf(high) else f"between {low} and {high}"
        raise ConfigError(f"{name} must be {limits} ({meaning}), found {value}")


class Sampler:
    """Chooses one token at a time for one reply: the tokens are those of `model.generate` with the same settings.

    The processors are built by the model itself, so everything that its generation_config.json says holds too.
    Sampling with `seed` draws the numbers that `torch.manual_seed(seed)` before `model.generate` would draw, but for
    logits on an accelerator with a top_k: there one for each of the top k, so that a seed gives another text.
    """

    def __init__(self, model: Any, options: SamplingOptions, prompt_ids: Sequence[int]) -> None:
        import torch

        config, _ = model._prepare_generation_config(None, **options.generation_kwargs())
        model._prepare_special_tokens(config, device=torch.device("cpu"))
        self.greedy = not config.do_sample
        self.eos_token_ids = frozenset() if options.ignore_eos else _token_ids(config.eos_token_id)
        self.max_new_tokens = options.max_new_tokens or _configured_length(model, len(prompt_ids))
        config.max_length = len(prompt_ids) + self.max_new_tokens
        self._processors = model._get_logits_processor(
            generation_config=config, input_ids_seq_length=len(prompt_ids), device="cpu", model_kwargs={}
        )
        self._ids = torch.tensor([list(prompt_ids)], dtype=torch.long)
        seed = options.seed if options.seed is not None else secrets.randbits(32)
        self._generator = torch.Generator(device="cpu").manual_seed(seed)

    def next(self, logits: torch.Tensor) -> int:
        """The next token from `logits` [V], any float dtype and device; it is remembered as part of the sequence."""
        import torch

        few = few_candidates(self._processors, logits, greedy=self.greedy)
        logits = logits if few is None else few[0]
        scores = self._processors(self._ids, logits.to("cpu", torch.float32, copy=True)[None])
        if self.greedy:
            token = torch.argmax(scores, dim=-1)
        else:
            token = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self._generator).squeeze(1)
        if few is not None:
            token = few[1].cpu()[token]
        self._ids = torch.cat([self._ids, token[:, None]], dim=-1)
        return int(token)


def _token_ids(value: int | Sequence[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _configured_length(model: Any, n_prompt: int) -> int:
    config = model.generation_config
    if config.max_new_tokens:
        return int(config.max_new_tokens)
    left = (config.max_length or 0) - n_prompt
    return left if left > 0 else DEFAULT_NEW_TOKENS
