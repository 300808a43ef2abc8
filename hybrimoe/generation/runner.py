"""What computes replies: a model, its tokenizer and its limits; each call gives logits on top of a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import CheckpointError
from hybrimoe.generation.context import ContextShift, model_context_tokens
from hybrimoe.generation.decoding import warn_of_other_decoding
from hybrimoe.generation.images.forward import ImageForward
from hybrimoe.generation.images.tokens import has_images
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.kv_memory import estimated_token_bytes, measured_token_bytes
from hybrimoe.generation.pace import DraftPace
from hybrimoe.generation.prompts.layer_major import LayerMajor, group_of
from hybrimoe.generation.sampling import Settings
from hybrimoe.generation.speculation import require_speculation

if TYPE_CHECKING:
    import torch

    from hybrimoe.generation.images.vision import Vision

__all__ = ["ModelRunner"]

NOTHING: Mapping[str, Any] = {}
MEASURE_TOKENS = 64
"""A cache that holds so many tokens is long enough to see what one takes."""


class ModelRunner:
    """A model and its tokenizer, within what it may take: logits of tokens on top of what a cache holds.

    prefill_chunk_tokens: of a prompt, that go through the model at once; it bounds the memory of intermediate results,
    not the result. None chooses by the free memory, anew for each prompt.
    kv_bytes: what keys and values may take, None for no limit; a prompt that would take more is refused, and a reply
    ends before it does. speculate: replies are computed with drafts, see `hybrimoe.generation.speculation`; raises
    ConfigError for a model that cannot. pace: how many tokens are drafted, None without drafts. shift: what is left out
    of texts that outgrow the context; None: a longer prompt is refused, and a reply ends there.
    forward_kwargs: what a forward call of the model takes beside its inputs; logits of the last token only, if it can.
    vision: what turns images into tokens of prompts; None: prompts are text.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, prefill_chunk_tokens: int | None = None, kv_bytes: int | None = None,
        speculate: bool = False, shift: ContextShift | None = None, vision: Vision | None = None,
    ) -> None:  # fmt: skip
        import inspect

        if speculate:
            require_speculation(model)
        self.model = model
        self.tokenizer = tokenizer
        self.settings = Settings(model)
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.kv_bytes = kv_bytes
        self.pace = DraftPace() if speculate else None
        self._token_bytes = estimated_token_bytes(model)
        self._measured = False
        self.vision = vision
        self._of_images = ImageForward(model)
        self.shift = shift
        if shift is not None:
            shift.check(self.context_tokens)
        warn_of_other_decoding(model)
        takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.forward_kwargs: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if takes_logits_to_keep:
            self.forward_kwargs["logits_to_keep"] = 1

    @property
    def context_tokens(self) -> int | None:
        """The longest sequence, prompt and reply together: the model's limit, or what the memory for keys and values
        holds where that is less; None where neither sets a limit."""
        limits = [limit for limit in (model_context_tokens(self.model.config), self.memory_tokens) if limit is not None]
        return min(limits, default=None)

    @property
    def whole_images(self) -> bool:
        """Whether an image of a prompt must be computed at once."""
        return self._of_images.whole_images

    @property
    def memory_tokens(self) -> int | None:
        """Tokens whose keys and values fit `kv_bytes`; None without a limit."""
        return None if self.kv_bytes is None or not self._token_bytes else self.kv_bytes // self._token_bytes

    def token_bytes(self) -> int:
        """Bytes that the keys and values of one more token take: estimated, after the first longer reply measured."""
        return self._token_bytes

    def forward(self, token_ids: Sequence[int], cache: PrefixCache) -> torch.Tensor:
        """Compute `token_ids` on top of `cache`; returns the logits [V] after the last of them."""
        with self._on_device():
            rows = None if has_images(token_ids) else self._step_logits(token_ids, cache)
            last: torch.Tensor = (self._model_logits(token_ids, cache) if rows is None else rows)[-1]
        return last

    def forward_rows(self, token_ids: Sequence[int], cache: PrefixCache) -> torch.Tensor:
        """As `forward`, with the logits [n, V] after each of the tokens."""
        with self._on_device():
            return self._model_logits(token_ids, cache, {"logits_to_keep": 0})

    def _model_logits(
        self, token_ids: Sequence[int], cache: PrefixCache, more: Mapping[str, Any] = NOTHING
    ) -> torch.Tensor:
        """Logits [n, V] by the model's forward, for which `more` replaces arguments that it takes."""
        try:
            outputs = self._outputs(token_ids, cache.states, cache.token_ids, self._shift_of(cache), more)
        except BaseException:
            cache.clear()  # some layers hold the new tokens, some do not
            raise
        cache.extended(token_ids, outputs.past_key_values)
        self._measure(cache)
        logits: torch.Tensor = outputs.logits[0]
        return logits

    def _outputs(
        self, token_ids: Sequence[int], states: Any, past_ids: Sequence[int], shift: int,
        more: Mapping[str, Any] = NOTHING,
    ) -> Any:  # fmt: skip
        """What the model's forward returns of tokens behind `past_ids`, whose keys and values are in `states`."""
        import torch

        kwargs = self.forward_kwargs | {name: more[name] for name in more if name in self.forward_kwargs}
        ids = torch.tensor([list(token_ids)], dtype=torch.long, device=self.model.device)
        with torch.inference_mode():
            inputs = self.model.prepare_inputs_for_generation(
                ids, past_key_values=states, is_first_iteration=not past_ids, **kwargs
            )
            return self.model(**inputs | self._of_images.arguments(token_ids, past_ids, shift))

    def by_layers(self, parts: Sequence[Sequence[int]], cache: PrefixCache) -> LayerMajor | None:
        """The first of the parts of a prompt, as many as should pass the model's layers together, on top of `cache`;
        None where each is to be computed by itself."""
        n_parts = group_of(self.model, cache, parts)
        if not n_parts:
            return None
        shift = self._shift_of(cache)

        def forward(token_ids: Sequence[int], states: Any, n_before: int) -> torch.Tensor:
            with self._on_device():
                logits: torch.Tensor = self._outputs(token_ids, states, range(n_before), shift).logits[0]
            return logits

        return LayerMajor(self.model, forward, cache, parts[:n_parts])

    def forward_each(self, token_ids: Sequence[int], caches: Sequence[PrefixCache]) -> torch.Tensor | None:
        """Compute a token of each of several sequences on top of its cache, in one compiled step; logits [n, V].

        Each row has the bits that `forward` gives for the sequence alone. None, before anything is computed, where they
        must be computed one after another. A step that fails leaves the caches as they were.
        """
        step = getattr(getattr(self.model, "hybrimoe", None), "step", None)
        if step is None:
            return None
        with self._on_device():
            logits: torch.Tensor | None = step.logits_of_each(
                token_ids, [cache.states for cache in caches], [self._shift_of(cache) for cache in caches]
            )
        if logits is not None:
            self._check_experts(caches)
            for token, cache in zip(token_ids, caches, strict=True):
                cache.extended([token], cache.states)
                self._measure(cache)
        return logits

    def _on_device(self) -> AbstractContextManager[None]:
        """Around work of the model: a device of its that hangs or has failed raises LostError."""
        from gpu_kernels.waiting import on_device

        return on_device(self.model.device)

    @property
    def has_lost_device(self) -> bool:
        """Whether a device of the model hangs or has failed, so that no reply can be made until the program starts
        again."""
        session = getattr(getattr(self.model, "hybrimoe", None), "session", None)
        return session is not None and bool(session.is_stuck)

    @property
    def has_lost_experts(self) -> bool:
        """Whether bytes of experts are lost, so that no reply can be made until the model is loaded again."""
        try:
            self._check_experts(())
        except CheckpointError:
            return True
        return False

    @property
    def failed_reads(self) -> str | None:
        """As `ExpertStore.failed_reads`, of the model's experts."""
        injection = getattr(self.model, "hybrimoe", None)
        failed: str | None = None if injection is None else injection.session.store.failed_reads
        return failed

    def _check_experts(self, caches: Sequence[PrefixCache]) -> None:
        """After a step beside the model's forward, which looks itself. Raises CheckpointError where experts that it may
        have used are lost; the caches hold nothing then."""
        injection = getattr(self.model, "hybrimoe", None)
        if injection is None:
            return
        try:
            injection.session.store.check()
        except CheckpointError:
            for cache in caches:
                cache.clear()
            raise

    def verify(self, token_ids: Sequence[int], cache: PrefixCache) -> torch.Tensor | None:
        """Compute a token and drafted ones on top of `cache`; returns the logits [n, V] after each of them.

        None, before anything is computed, where the compiled step leaves them to the model. Each row has the bits that
        `forward` gives token by token.
        """
        with self._on_device():
            return self._step_logits(token_ids, cache, drafted=True)

    def make_room(self, error: torch.OutOfMemoryError) -> None:
        """After a prompt for which an accelerator had no memory left. Raises `error` for a model without a session,
        BudgetError where there are no slots to give up."""
        session = getattr(getattr(self.model, "hybrimoe", None), "session", None)
        if session is None:
            raise error
        session.make_room(error)

    def _step_logits(
        self, token_ids: Sequence[int], cache: PrefixCache, *, drafted: bool = False
    ) -> torch.Tensor | None:
        """Logits [n, V] by the model's compiled step; None where it has none or leaves these tokens to the model."""
        step = getattr(getattr(self.model, "hybrimoe", None), "step", None)
        if step is None:
            return None
        try:
            logits: torch.Tensor | None = step.next_logits(
                token_ids, cache.states, drafted=drafted, shift=self._shift_of(cache)
            )
        except BaseException:
            cache.clear()
            raise
        if logits is not None:
            self._check_experts([cache])
            cache.extended(token_ids, cache.states)
            self._measure(cache)
        return logits

    def _shift_of(self, cache: PrefixCache) -> int:
        """By how much the images in a cache move the positions of the text behind them."""
        return cache.n_shifted() if self._of_images.in_a_plane else 0

    def _measure(self, cache: PrefixCache) -> None:
        """Learn from a cache what a token takes, once."""
        layers = [] if self._measured or len(cache.token_ids) < MEASURE_TOKENS else cache.growing_layers()
        if layers:
            self._token_bytes = measured_token_bytes(layers, len(cache.token_ids))
            self._measured = True
