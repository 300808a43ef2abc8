"""One dense feed-forward part cut into a shared expert and routed ones, which together compute what it computed.

A gated feed-forward part is a sum over its neurons, `sum_i silu(g_i x) (u_i x) d_i`, so that any grouping of them into
experts gives the same sum. Neurons that are strong on most tokens go to the shared expert; the others are grouped with
those that are strong on the same tokens, so that few groups have most of the sum (as in MoEfication, arXiv
2110.01786). The router is fitted to how much each expert gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

__all__ = ["Cut", "FeedForward", "cut"]

ROUNDS = 5
"""Of assigning neurons and moving the centres of groups; more change next to nothing."""
RIDGE = 1e-2
"""Weight of the penalty on the router's weights, relative to the mean square of its inputs."""
ROUTER_SPREAD = 2.0**-15
"""The largest score that the router gives. Scores decide by their order alone: the weights of experts are a softmax,
and with scores so small each is one in the number of experts, to a relative 3e-5, whatever their order says."""


@dataclass(frozen=True, slots=True)
class FeedForward:
    """Weights of a gated feed-forward part in float32: gate and up [I, H], down [H, I]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """What each neuron adds along its column of `down`, [T, I], for inputs x [T, H]."""
        return functional.silu(x @ self.gate.T) * (x @ self.up.T)


@dataclass(frozen=True, slots=True)
class Cut:
    """Neurons of the shared expert [S] and of the routed ones [E, M], each in ascending order; router [E, H]."""

    shared: torch.Tensor
    experts: torch.Tensor
    router: torch.Tensor


def cut(part: FeedForward, x: torch.Tensor, n_shared: int, n_experts: int) -> Cut:
    """The cut for inputs x [T, H] float32; the neurons beside the shared ones must divide by n_experts."""
    neurons = part.neurons(x)
    strength = neurons.abs() * part.down.norm(dim=0)
    order = strength.square().mean(dim=0).argsort(descending=True, stable=True)
    shared, rest = order[:n_shared].sort().values, order[n_shared:].sort().values
    group = _grouped(functional.normalize(strength[:, rest], dim=0).T, n_experts)
    experts = torch.stack([rest[group == number] for number in range(n_experts)])
    given = [(neurons[:, rows] @ part.down[:, rows].T).norm(dim=1) for rows in experts]
    return Cut(shared, experts, _router(x, torch.stack(given, dim=1)))


def _grouped(features: torch.Tensor, n_groups: int) -> torch.Tensor:
    """Groups of one size of rows of unit length [N, F]: the number of each row's, [N]."""
    centres = features[_far_apart(features, n_groups)]
    for _ in range(ROUNDS):
        group = _assigned(features @ centres.T)
        sums = torch.zeros_like(centres).index_add_(0, group, features)
        centres = functional.normalize(sums, dim=1)
    return group


def _far_apart(features: torch.Tensor, n_groups: int) -> torch.Tensor:
    """Rows to begin with: each is the one that is least like those before it; the first is most like all."""
    chosen = [int((features @ features.mean(dim=0)).argmax())]
    nearest = features @ features[chosen[0]]
    while len(chosen) < n_groups:
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, features @ features[chosen[-1]])
    return torch.tensor(chosen)


def _assigned(likeness: torch.Tensor) -> torch.Tensor:
    """The group of each row, groups of one size: of all pairs [N, G] the most alike first, ties by their order."""
    n_rows, n_groups = likeness.shape
    room = [n_rows // n_groups] * n_groups
    group = [-1] * n_rows
    for pair in likeness.flatten().argsort(descending=True, stable=True).tolist():
        row, number = divmod(pair, n_groups)
        if group[row] < 0 and room[number]:
            group[row] = number
            room[number] -= 1
    return torch.tensor(group)


def _router(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Weights [E, H] whose scores order the experts by how much they give [T, E] for x [T, H]: least squares."""
    inputs = x.double()
    wanted = given.double()
    wanted = wanted - wanted.mean(dim=1, keepdim=True)
    gram = inputs.T @ inputs
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram + penalty, inputs.T @ wanted).T
    largest = float((inputs @ weights.T).abs().max().clamp(min=1e-30))
    router: torch.Tensor = (weights * (ROUTER_SPREAD / largest)).float()
    return router
