"""Muon: momentum whose every matrix is replaced by the nearest orthogonal one (Jordan et al., 2024).

torch.optim.Muon takes single matrices; experts are stacks of them, so this one works on the last two dimensions.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalise"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, tuned for steep convergence of small singular values (Jordan et al., 2024)."""

NEWTON_SCHULZ_STEPS = 5
UPDATE_RMS = 0.2
"""Root mean square of an update over the learning rate: that of AdamW, so that both take the same rate
(Liu et al., Muon is scalable for LLM training, 2025, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """Optimiser for parameters [..., rows, columns]; a group's `blocks` cuts the rows into matrices of their own.

    `blocks=2` is for gate and up projections that lie one above the other in a tensor. With a `pool` the parameters
    are updated side by side, each by one thread.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        blocks: int = 1,
        pool: Executor | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "blocks": blocks})
        self._map = map if pool is None else pool.map

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        due = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in due:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
        list(self._map(self._update, [p for p, _ in due], [group for _, group in due]))
        return loss

    @torch.no_grad()
    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = cast(Tensor, parameter.grad)
        momentum: Tensor = self.state[parameter]["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = torch.lerp(gradient, momentum, group["momentum"])
        rows, columns = parameter.shape[-2] // group["blocks"], parameter.shape[-1]
        update = orthogonalise(ahead.reshape(-1, rows, columns)).reshape(parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * UPDATE_RMS * max(rows, columns) ** 0.5)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Brings all singular values of [n, rows, columns] near 1 (0.7 to 1.2) by Newton-Schulz steps in bfloat16."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return result
