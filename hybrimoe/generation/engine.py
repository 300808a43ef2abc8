"""A model and its tokenizer, ready to reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybrimoe.errors import PromptError
from hybrimoe.generation.context import model_context_tokens
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.profile import Profile
from hybrimoe.generation.reply import Reply
from hybrimoe.generation.runner import ModelRunner
from hybrimoe.generation.sampling import SamplingOptions
from hybrimoe.generation.vocabulary import check_token_ids
from hybrimoe.text_files import require_text

__all__ = ["TextGenerator"]


def _never() -> bool:
    return False


class TextGenerator(ModelRunner):
    """Replies of a model, as `ModelRunner` says. Greedy and seeded tokens are those of `model.generate`."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer puts in front.

        Raises:
            PromptError: the text is empty or only white space, or is no Unicode.
        """
        if not text.strip():
            raise PromptError("the prompt is empty: expected some text to continue")
        require_text(text, "the prompt")
        return list(self.tokenizer(text)["input_ids"])

    def reply(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions | None = None,
        *,
        cache: PrefixCache | None = None,
        should_stop: Callable[[], bool] = _never,
        profile: Profile | None = None,
        part_tokens: int | None = None,
        part_slower: float = 0.0,
        part_us: float | None = None,
    ) -> Reply:
        """A reply to `prompt_ids`, computed while it is iterated.

        Args:
            cache: kept from reply to reply; what a prompt shares with the sequence before is not computed again.
            should_stop: asked between tokens and prefill chunks; True ends the reply, with what there is.
            profile: a new one, which then has where the time went.
            part_tokens: of the prompt, that are computed at once at most; None for `prefill_chunk_tokens`.
            part_slower: by which a part is smaller for each token before it, see `prompts.parts.PromptPart`.
            part_us: what `prefill` may take where parts pass the layers together; None for all of them at once.

        Raises:
            PromptError: no token, one that the model does not have, or no room for a reply in the model's context.
        """
        self.check_prompt(len(prompt_ids))
        if options is not None and options.prompt_logprobs is not None:
            self.check_prompt(len(prompt_ids), may_shift=False)
        check_token_ids(self.model, prompt_ids, self.tokenizer)
        options = (options or SamplingOptions()).with_seed()
        cache = cache or PrefixCache(self.model)
        return Reply(self, list(prompt_ids), options, cache, should_stop, profile, part_tokens, part_slower, part_us)

    def check_prompt(self, n_tokens: int, *, may_shift: bool = True) -> None:
        """Raises PromptError unless a prompt of `n_tokens` leaves room for one token, or what is too much of it is left
        out (may_shift: where that is what the deployment says)."""
        limit = self.context_tokens
        if n_tokens == 0:
            raise PromptError("the prompt has no tokens: expected some text to continue")
        if limit is not None and n_tokens >= limit and not (may_shift and self.shift is not None):
            what = f"the model's context is {limit} tokens"
            if limit == self.memory_tokens and limit != model_context_tokens(self.model.config):
                what = f"the memory for keys and values ({(self.kv_bytes or 0) / 2**20:.0f} MiB) holds {limit} tokens"
            raise PromptError(
                f"the prompt has {n_tokens} tokens; {what}, prompt and reply together. "
                f"Shorten the prompt to at most {limit - 1} tokens"
                + (", or raise memory.kv." if "memory" in what else ".")
                + (" --context-shift leaves the oldest tokens out." if may_shift else "")
            )
