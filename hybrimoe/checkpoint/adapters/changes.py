"""What an adapter makes of one parameter while its values are read: adds to it, rescales its rows, or replaces it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hybrimoe.checkpoint.adapters.deltas import Delta, Matrix
from hybrimoe.checkpoint.conversion import Conversion, ModelShapes
from hybrimoe.checkpoint.safetensors_file import StoredTensor


@dataclass(frozen=True, slots=True)
class Joined:
    """What is added to parameters that the model's mapping joins from several weights, or cuts out of one.

    conversion: as of the weights themselves, with deltas in their place.
    """

    conversion: Conversion
    num_experts: int

    def whole(self, key: str, values: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        return values.float().add_(self.conversion.whole(shapes)[key])

    def expert(self, key: str, index: int, entry: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        if self.conversion.keeps_experts_apart(self.num_experts):
            return entry.float().add_(self.conversion.expert(index, shapes))
        whole = self.conversion.whole(replace(shapes, first_entries=False))[key]
        return entry.float().add_(whole[index : index + 1])

    def prepared(self) -> Joined:
        return self


@dataclass(frozen=True, slots=True)
class Added:
    """What is added to a parameter that is one weight of the adapter."""

    delta: Delta

    def whole(self, key: str, values: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        merged = values.float()
        self.delta.add_to(merged)
        return merged

    def expert(self, key: str, index: int, entry: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        return entry.float().add_(self.delta.read_slice(index))

    def prepared(self) -> Added:
        return Added(self.delta.prepared())


@dataclass(frozen=True, slots=True)
class Rescaled:
    """DoRA (arXiv 2402.09353): after the addition each row gets the length that the adapter has learned for it."""

    delta: Delta
    lengths: Matrix

    def whole(self, key: str, values: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        merged = Added(self.delta).whole(key, values, shapes)
        return merged.mul_((self.lengths.read() / torch.linalg.vector_norm(merged, dim=1))[:, None])

    def expert(self, key: str, index: int, entry: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        merged = entry.float().add_(self.delta.read_slice(index))
        return merged.mul_(self.lengths.read()[index] / torch.linalg.vector_norm(merged))

    def prepared(self) -> Rescaled:
        return self


@dataclass(frozen=True, slots=True)
class Replaced:
    """Weights of the adapter in the place of the model's own."""

    stored: StoredTensor

    def whole(self, key: str, values: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        return Matrix(self.stored).read()

    def expert(self, key: str, index: int, entry: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        return self.stored.read_slice(index).float()

    def prepared(self) -> Replaced:
        return self
