"""The random numbers of a reply: those that torch would draw, computed for the tokens that have a chance."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TRIED_NUMBERS = 4096
"""Of each way of drawing, before one stands for the other."""


class Draws:
    """A reply's generator of random numbers, which begins at `seed` on each device anew."""

    def __init__(self, seed: int) -> None:
        import torch

        self._seed = seed
        self._generator = torch.Generator(device="cpu").manual_seed(seed)

    def move_to(self, device: torch.device) -> None:
        """Draws are for scores on `device` from now on."""
        import torch

        self._generator = torch.Generator(device=device).manual_seed(self._seed)

    def choose(self, scores: torch.Tensor, of: torch.Tensor | None = None, n_tokens: int | None = None) -> torch.Tensor:
        """The place [1] of a token by the chances of `scores` [1, k].

        It is the one that torch.multinomial draws, without the check of the chances, for which a card stops the host:
        each chance over a number of its own, of which there is one for each token of the vocabulary.

        of: token ids [k] on the host, where the scores are those of some of `n_tokens` tokens, and the others have no
        chance.
        """
        import torch

        chances = torch.softmax(scores, dim=-1)
        waits = self._waits(chances, of, n_tokens or chances.shape[-1])
        if chances.device.type == "cpu":
            return torch.tensor([int((chances / waits).numpy().argmax())])
        return (chances / waits).argmax(dim=-1)

    def _waits(self, chances: torch.Tensor, of: torch.Tensor | None, n_tokens: int) -> torch.Tensor:
        """Numbers [1, k] of the exponential distribution, for the tokens `of` of n_tokens."""
        import torch

        if chances.device.type == "cpu" and _logarithms_are_exponentials():
            uniform = torch.rand(n_tokens, dtype=torch.float64, generator=self._generator)
            return _exponential(uniform if of is None else uniform[of])[None]
        waits = torch.empty((1, n_tokens), device=chances.device).exponential_(generator=self._generator)
        return waits if of is None else waits[:, of]


def _exponential(uniform: torch.Tensor) -> torch.Tensor:
    """Float32 numbers of the exponential distribution from uniform float64 ones, which are overwritten."""
    return uniform.neg_().log1p_().neg_().float()


@cache
def _logarithms_are_exponentials() -> bool:
    """Whether torch draws exponential numbers on the host as logarithms of uniform ones, bit for bit: then there need
    be logarithms of few of them. Builds that draw them by another library do not."""
    import torch

    ours, theirs = (torch.Generator(device="cpu").manual_seed(1) for _ in range(2))
    found = _exponential(torch.rand(TRIED_NUMBERS, dtype=torch.float64, generator=ours))
    expected = torch.empty(TRIED_NUMBERS).exponential_(generator=theirs)
    return torch.equal(found, expected) and torch.equal(ours.get_state(), theirs.get_state())
