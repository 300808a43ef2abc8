"""How long a sequence the model is made for, and what stays of one that grows beyond that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe.errors import ConfigError

__all__ = ["ContextShift", "model_context_tokens"]


@dataclass(frozen=True, slots=True)
class ContextShift:
    """Texts may go on beyond the context: their oldest tokens are left out, but for the first `n_sinks`, and the states
    of what is kept are computed once more.

    To turn the keys that are there to their new places would be quicker, but it is right for plain rotary embeddings
    alone, and their values would still know of the tokens that are gone. Computed anew, every model (scaled rotary
    embeddings, learned positions, windows, latent attention, recurrent states) gives what it gives for the kept tokens.
    Half of the context is kept, so that a token of a long text is computed about twice. Models attend much to the first
    tokens, whatever they are (Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023).
    """

    n_sinks: int = 4

    def check(self, limit: int | None) -> None:
        """Raises ConfigError where a context of `limit` tokens has no room for the sinks and as many other tokens."""
        if limit is not None and 2 * self.n_sinks + 2 > limit:
            raise ConfigError(
                f"generation.attention_sinks: {self.n_sinks} of a context of {limit} tokens; expected at most"
                f" {max(0, limit // 2 - 1)}"
            )

    def kept(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """What stays of a text that has more tokens than `limit`: its sinks, and the newest for half of the rest."""
        n_newest = max(1, (limit - self.n_sinks) // 2)
        return [*token_ids[: self.n_sinks], *token_ids[-n_newest:]]


def model_context_tokens(config: Any) -> int | None:
    """The longest sequence that the model is made for, prompt and reply together; None where it sets no limit.

    config: of the model. Its max_position_embeddings, or more where YaRN stretches the positions and
    max_position_embeddings was left as trained (as Qwen's documentation has it), or where dynamic scaling says for what
    it was trained (original_max_position_embeddings). The other stretched embeddings come with the stretched length as
    max_position_embeddings (Llama 3, Phi, Gemma 3).
    """
    text_config = config.get_text_config(decoder=True)
    limit = getattr(text_config, "max_position_embeddings", None)
    if not limit:
        return None
    return max([int(limit), *(_stretched(rope, int(limit)) for rope in _rope_parameters(text_config))])


def _rope_parameters(text_config: Any) -> list[Mapping[str, Any]]:
    """Rope parameters: the one set of the model, or one for each kind of its layers."""
    parameters = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None)
    if not isinstance(parameters, Mapping):
        return []
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


def _stretched(rope: Mapping[str, Any], limit: int) -> int:
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "yarn" and not (kind == "dynamic" and "original_max_position_embeddings" in rope):
        return 0
    original = rope.get("original_max_position_embeddings") or limit
    return int(original * (rope.get("factor") or 1.0))
