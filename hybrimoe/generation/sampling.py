"""Sampling options and the choice of the next token, with transformers' own processors in transformers' own order."""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hybrimoe import compat
from hybrimoe.errors import ConfigError, ModelError
from hybrimoe.generation.drawing.candidates import few_candidates, first_that_narrows, kept_by, sent_together
from hybrimoe.generation.drawing.draws import Draws
from hybrimoe.generation.vocabulary import check_token_ids

if TYPE_CHECKING:
    import torch

    from hybrimoe.generation.constraint import Constraint

__all__ = [
    "UNLIMITED_TOKENS",
    "Sampler",
    "SamplingOptions",
    "Settings",
    "TokenLogprob",
    "reply_length",
    "with_length",
]

COMPLETION_TOKENS = 256
"""Length of a completion at the command line and in batches, where nothing sets one: plain text need not end."""

UNLIMITED_TOKENS = 2**31 - 1
"""Length of a reply where nothing sets one: it ends with the text, or with the context."""

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: logits divided by less overflow float32. vLLM draws the line there, too."""

MAX_TEMPERATURE = 100.0
"""Logits divided by more are the same number for every token; OpenAI allows 2."""

PENALTY_RANGE = (0.01, 100.0)
"""Repetition penalties: logits times or over what is outside are no longer numbers of float32."""

MAX_LOGIT_BIAS = 100.0
"""OpenAI's limit of a logit bias, either way; it decides any choice already."""

KNOWN_SETTINGS = 64
"""Kinds of replies (temperatures, lengths, ...) whose settings are remembered; with one more it begins anew."""

MAX_FREQUENCY_PENALTY = 2.0
"""OpenAI's limit of frequency and presence penalties, either way."""

NUMBERS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
           "no_repeat_ngram_size", "max_length", "max_new_tokens", "min_length", "min_new_tokens")  # fmt: skip
"""Entries of generation_config.json that are numbers; transformers compares some of them before it looks."""

BAD_SETTINGS = (ValueError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError)
"""What transformers raises of a generation configuration that it cannot use."""

MAX_TOP_LOGPROBS = 20
"""OpenAI's limit of alternatives whose log probability is told."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log of a chosen token's probability under the model's own logits, before temperature, penalties and bias.

    top: the most probable tokens and theirs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to choose tokens and when to stop. None means: as the model's generation_config.json says.

    temperature: 0 is greedy. Any of temperature, top_p, top_k, min_p given (and temperature not 0) samples.
    top_p, min_p: in [0, 1]. top_k: 0 switches it off.
    repetition_penalty: of tokens in prompt and reply, 1 is none; where it is not given, the model's own, but none in a
        reply with a `constraint`, whose names and values must repeat.
    frequency_penalty, presence_penalty: taken from the logit of each token of the reply, for every time that it
        stands there, and once; as OpenAI defines them.
    logit_bias: pairs of a token id and what is added to its logit.
    seed: of the generator that samples; None draws one, which the reply's summary tells.
    stop: texts that end the reply; they are not part of it.
    max_new_tokens: None is until the end of the text or of the context, unless the generation config says a number.
    top_logprobs: for each token, record its log probability and those of so many best ones; None records nothing.
    prompt_logprobs: the same for each token of the prompt, which is computed anew from its beginning for that.
    constraint: the structure of the reply; only tokens that it allows are chosen, and the reply ends where it does.
    shown_special: special tokens whose names are part of the reply's text; of the others there is none.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    shown_special: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, MAX_TEMPERATURE, "0 is greedy, 1 leaves probabilities alone")
        _in_range("top_p", self.top_p, 0.0, 1.0, "the share of probability that is kept")
        _in_range("top_k", self.top_k, 0, math.inf, "a number of tokens; 0 switches it off")
        _in_range("min_p", self.min_p, 0.0, 1.0, "a share of the largest probability")
        _in_range("max_new_tokens", self.max_new_tokens, 1, math.inf, "a number of tokens")
        _in_range("seed", self.seed, 0, 2**63 - 1, "an integer")
        _in_range("repetition_penalty", self.repetition_penalty, *PENALTY_RANGE, "1 switches it off")
        for name in ("frequency_penalty", "presence_penalty"):
            _in_range(name, getattr(self, name), -MAX_FREQUENCY_PENALTY, MAX_FREQUENCY_PENALTY, "0 switches it off")
        for token, bias in self.logit_bias:
            _in_range(f"logit_bias of token {token}", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, "added to its logit")
        for name in ("top_logprobs", "prompt_logprobs"):
            _in_range(name, getattr(self, name), 0, MAX_TOP_LOGPROBS, "a number of tokens")
        if any(not text for text in self.stop):
            raise ConfigError("an empty stop text would end every reply at once; leave it out")

    @property
    def samples(self) -> bool | None:
        """True: draw; False: greedy; None: as the model's generation config says."""
        if self.temperature is not None:
            return self.temperature >= GREEDY_BELOW
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


class Settings:
    """The generation configuration of a model with the options of a reply over it. Those of the latest kinds of replies
    are remembered: transformers takes half a millisecond to put one together. One thread asks."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._own: dict[str, Any] = {}
        self._known: dict[tuple[tuple[str, Any], ...], Any] = {}

    def of(self, options: SamplingOptions) -> Any:
        """One of the caller's own. What the model's configuration says now holds."""
        own = vars(self._model.generation_config)
        if own != self._own or len(self._known) >= KNOWN_SETTINGS:
            self._own, self._known = copy.deepcopy(own), {}
        given = options.generation_kwargs()
        key = tuple(given.items())
        if key not in self._known:
            self._known[key] = compat.generation_settings(self._model, given)
        return copy.copy(self._known[key])


class Sampler:
    """Chooses one token at a time for one reply: the tokens are those of `model.generate` with the same settings.

    The processors are built by the model itself, so everything that its generation_config.json says holds too; bias and
    the penalties that transformers does not have come before them. Sampling with `seed` draws the numbers that
    `torch.manual_seed(seed)` before `model.generate` would draw, but for logits on an accelerator with a top_k: there
    one for each of the top k, so that a seed gives another text.

    Logits on an accelerator stay there: what comes to the host is the best candidates or, where a processor or an
    option needs every token, the choice. A seed gives another text on another kind of device, as in transformers.

    logprobs: of each chosen token, where `options.top_logprobs` asks for them. settings: kept from reply to reply.

    Raises PromptError for a logit bias of a token that the model does not have, ModelError where its
    generation_config.json has a value that tokens cannot be chosen with.
    """

    def __init__(
        self, model: Any, options: SamplingOptions, prompt_ids: Sequence[int], settings: Settings | None = None
    ) -> None:
        import torch

        check_token_ids(model, (token for token, _ in options.logit_bias), what="logit_bias")
        if options.constraint is not None and options.repetition_penalty is None:
            options = replace(options, repetition_penalty=1.0)
        config = (settings or Settings(model)).of(options)
        self.greedy = not config.do_sample
        self.eos_token_ids = frozenset() if options.ignore_eos else _token_ids(config.eos_token_id)
        self.max_new_tokens = reply_length(model, options, len(prompt_ids))
        config.max_length = len(prompt_ids) + self.max_new_tokens
        self._processors_on = partial(_processors, model, config, len(prompt_ids))
        self._processors = self._processors_on("cpu")
        self._narrows = None if self.greedy else first_that_narrows(self._processors)
        self._ids = torch.tensor([list(prompt_ids)], dtype=torch.long)
        self._adjustments = _Adjustments(options)
        self._structure = None if options.constraint is None else options.constraint.begin()
        self._top_logprobs = options.top_logprobs
        self.logprobs: list[TokenLogprob] = []
        self._draws = Draws(options.seed if options.seed is not None else secrets.randbits(32))

    @property
    def is_complete(self) -> bool:
        """Whether the structure of the reply has its end, after which no token may come."""
        return self._structure is not None and self._structure.is_complete

    def next(self, logits: torch.Tensor) -> int:
        """The next token from `logits` [V], any float dtype and device; it is remembered as part of the sequence.

        Runs on one thread of torch: its others would spin for milliseconds afterwards, on the cores that the next
        step needs.

        Raises ModelError for logits with NaN or infinity; minus infinity excludes a token. ConstraintError where the
        structure of the reply has become too complex to follow, LostError where the logits' device hangs.
        """
        from cpu_kernels.host.threads import torch_threads
        from gpu_kernels.waiting import wait_for_stream

        wait_for_stream(logits.device, "the model's output")
        with torch_threads(1):
            return self._next(logits)

    def _next(self, logits: torch.Tensor) -> int:
        import torch

        needs_all = self._adjustments.any or self._top_logprobs is not None or self._structure is not None
        few = None if needs_all else few_candidates(self._processors, logits, greedy=self.greedy)
        if few is None:
            self._move_to(logits.device)
            own, token_ids = logits.to(torch.float32, copy=True), None
        else:
            own, token_ids = sent_together(*few)
        on_host = own.device.type == "cpu" and token_ids is None
        token, chosen, largest = self._on_host(own) if on_host else self._there(own, token_ids)
        if not math.isfinite(largest):
            raise ModelError(
                f"the model's logits after {self._ids.shape[-1]} tokens are not finite numbers: its weights are"
                " damaged, or a dtype overflows; try expert_dtype and dense_dtype float32"
            )
        self._ids = torch.cat([self._ids, token[:, None]], dim=-1)
        self._adjustments.count(chosen)
        if self._structure is not None:
            self._structure.accept(chosen)
        if self._top_logprobs is not None:
            self.logprobs.append(_logprob(own, chosen, self._top_logprobs))
        return chosen

    def _on_host(self, own: torch.Tensor) -> tuple[torch.Tensor, int, float]:
        """The token [1] that is chosen by the model's logits [V], its number, and the largest of them: NaN where one
        is. NumPy searches by vectors, and takes the first of several, as torch does one by one."""
        import torch

        largest = float(own.numpy().max())
        if not math.isfinite(largest):
            return self._ids[0, -1:], -1, largest
        narrows = len(self._processors) if self._narrows is None else self._narrows
        scores, token_ids = self._processed(self._allowed(own), self._processors[:narrows]), None
        if narrows < len(self._processors):
            kept = kept_by(self._processors[narrows], scores[0].numpy())
            if kept is not None:
                token_ids, narrows = torch.from_numpy(kept), narrows + 1
                scores = scores[:, token_ids]
            scores = self._processed(scores[0], self._processors[narrows:])
        if self.greedy:
            token = torch.tensor([int(scores[0].numpy().argmax())])
        else:
            token = self._draws.choose(scores, token_ids, len(own))
        if token_ids is not None:
            token = token_ids[token]
        return token, int(token), largest

    def _there(self, own: torch.Tensor, token_ids: torch.Tensor | None) -> tuple[torch.Tensor, int, float]:
        """The same, of logits on an accelerator, or of its best candidates, whose ids are `token_ids`."""
        import torch

        scores = self._processed(self._allowed(own), self._processors)
        token = torch.argmax(scores, dim=-1) if self.greedy else self._draws.choose(scores)
        if token_ids is not None:
            token = token_ids[token]
        largest, chosen = sent_together(own.max()[None], token)
        return token, int(chosen), float(largest)

    def _allowed(self, own: torch.Tensor) -> torch.Tensor:
        """The model's logits [V] with bias and penalties, and only what the structure of the reply allows."""
        adjusted = self._adjustments.apply(own)
        return adjusted if self._structure is None else self._structure.masked(adjusted)

    def _processed(self, scores: torch.Tensor, processors: Sequence[Any]) -> torch.Tensor:
        """Scores [1, k] from [k], as their list makes them, but for asking each what it takes."""
        processed = scores[None]
        for processor in processors:
            processed = processor(self._ids, processed)
        return processed

    def _move_to(self, device: torch.device) -> None:
        """What meets the logits lies on their device from now on; on another one than before, draws begin anew."""

        if self._ids.device == device:
            return
        self._ids = self._ids.to(device)
        self._processors = self._processors_on(str(device))
        self._adjustments.move_to(device)
        self._draws.move_to(device)


def check_settings(model: Any, what: str) -> None:
    """Raises ModelError where the model's generation configuration has a value that no reply could be chosen with.

    what: where it comes from, as the message says it.
    """
    for name in NUMBERS:
        value = getattr(model.generation_config, name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ModelError(f"{what}: {name}: expected a number, found {value!r}; correct the file, or remove it")
    try:
        settings = compat.generation_settings(model, {})
    except BAD_SETTINGS as error:
        raise ModelError(f"{what}: transformers cannot use it: {error}; correct the file, or remove it") from error
    _processors(model, settings, 1, what=what)


def _processors(
    model: Any, config: Any, n_prompt_tokens: int, device: str = "cpu", *, what: str = "generation_config.json"
) -> Any:
    try:
        return compat.logits_processors(model, config, n_prompt_tokens, device)
    except BAD_SETTINGS as error:
        raise ModelError(
            f"{what}: transformers cannot choose tokens with it: {error}; correct the file, or remove it"
        ) from error


class _Adjustments:
    """Logit bias, frequency and presence penalty of one reply."""

    def __init__(self, options: SamplingOptions) -> None:
        import torch

        self._frequency, self._presence = options.frequency_penalty, options.presence_penalty
        self._counts: dict[int, int] = {}
        self._bias_ids = torch.tensor([token for token, _ in options.logit_bias], dtype=torch.long)
        self._bias = torch.tensor([bias for _, bias in options.logit_bias], dtype=torch.float32)
        self.any = bool(options.logit_bias or self._frequency or self._presence)

    def move_to(self, device: torch.device) -> None:
        """The logits lie on `device` from now on."""
        self._bias_ids, self._bias = self._bias_ids.to(device), self._bias.to(device)

    def count(self, token: int) -> None:
        """`token` was chosen."""
        if self.any:
            self._counts[token] = self._counts.get(token, 0) + 1

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Adjusted `logits` [V]; the given ones stay as they are."""
        import torch

        if not self.any:
            return logits
        logits = logits.clone()
        logits[self._bias_ids] += self._bias
        if self._counts:
            tokens = torch.tensor(list(self._counts), device=logits.device)
            times = torch.tensor(list(self._counts.values()), dtype=torch.float32, device=logits.device)
            logits[tokens] -= self._frequency * times + self._presence
        return logits


def _logprob(logits: torch.Tensor, chosen: int, n_top: int) -> TokenLogprob:
    import torch

    logprobs = torch.log_softmax(logits, dim=-1)
    values, tokens = logprobs.topk(min(n_top, len(logprobs)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(chosen, float(logprobs[chosen]), top)


def with_length(options: SamplingOptions, model: Any, n_tokens: int) -> SamplingOptions:
    """`options`, with replies of at most `n_tokens` where neither they nor the model's configuration set a length."""
    configured = model.generation_config.max_new_tokens or model.generation_config.max_length
    return options if options.max_new_tokens or configured else replace(options, max_new_tokens=n_tokens)


def reply_length(model: Any, options: SamplingOptions, n_prompt: int) -> int:
    """Tokens that a reply may have by its options or the model's configuration; UNLIMITED_TOKENS where neither says."""
    return options.max_new_tokens or _configured_length(model, n_prompt) or UNLIMITED_TOKENS


def _token_ids(value: int | Sequence[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _configured_length(model: Any, n_prompt: int) -> int | None:
    """The length of a reply that the model's generation_config.json says; None where it says none."""
    config = model.generation_config
    if config.max_new_tokens:
        return int(config.max_new_tokens)
    left = (config.max_length or 0) - n_prompt
    return left if left > 0 else None
