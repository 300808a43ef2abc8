"""Prompts whose experts go over the link, not into slots but into a buffer of the accelerator that every layer reuses.

With many tokens a layer activates nearly all of its experts, and carrying them to the accelerator takes less time than
the CPU would. llama.cpp does so for every batch of at least 32 tokens; KTransformers' layerwise prompts, MOM and others
upload a layer while the one before it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.errors import PolicyError


@dataclass(frozen=True, slots=True)
class Streaming:
    """Prompt steps of at least ``min_tokens`` tokens are streamed; slots keep what they have, and that is used.

    ``ahead`` False: when a layer's routing is known its activated experts are uploaded, then computed, nothing
    meanwhile. True: two buffers; all experts of a layer, since its routing is not known yet, are uploaded while the
    layer before is computed. Raises PolicyError for fewer than 1 token.
    """

    min_tokens: int = 32
    ahead: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 1:
            raise PolicyError(
                f"streamed prompts: min_tokens must be an integer of at least 1, found {self.min_tokens!r}"
            )
        if not isinstance(self.ahead, bool):
            raise PolicyError(f"streamed prompts: ahead must be true or false, found {self.ahead!r}")
