"""What LoRA adds to a weight, as a source that is computed when it is asked for: whole, or one expert's slice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from hybrimoe.checkpoint.formats.dequantise import Source
from hybrimoe.checkpoint.safetensors_file import StoredTensor
from hybrimoe.checkpoint.stored import Storage
from hybrimoe.errors import CheckpointError

STORAGE = Storage("LoRA")


class Delta(Source, Protocol):
    """What is added to a weight or, where the model's mapping joins weights, to a part of one; all float32.

    A source, so that the mapping makes of deltas what it makes of weights: all that it does is linear. Its key is where
    it stands in the adapter.
    """

    def add_to(self, values: torch.Tensor) -> None:
        """Adds all of it to float32 `values`, without a copy of either."""

    def prepared(self) -> Delta:
        """The same with its matrices in memory."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of an adapter, on disk or in memory."""

    stored: StoredTensor
    values: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.stored.shape

    def read(self) -> torch.Tensor:
        """float32. Raises CheckpointError for values that are not finite."""
        if self.values is not None:
            return self.values
        values = self.stored.read().float()
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"{self.stored.file}: {self.stored.key} has values that are NaN or infinite; the adapter is damaged"
            )
        return values

    def in_memory(self) -> Matrix:
        """The same, read."""
        return replace(self, values=self.read())


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale x b a of a matrix [out, in]; transposed: the weight is [in, out] (an embedding, a Conv1D)."""

    key: str
    a: Matrix
    b: Matrix
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.a.stored, self.b.stored

    @property
    def storage(self) -> Storage:
        return STORAGE

    def read(self) -> torch.Tensor:
        product = (self.b.read() @ self.a.read()).mul_(self.scale)
        return product.T if self.transposed else product

    def read_slice(self, index: int) -> torch.Tensor:
        return self.read()[index : index + 1]

    def add_to(self, values: torch.Tensor) -> None:
        (values.T if self.transposed else values).addmm_(self.b.read(), self.a.read(), alpha=self.scale)

    def prepared(self) -> LowRank:
        return replace(self, a=self.a.in_memory(), b=self.b.in_memory())


@dataclass(frozen=True, slots=True)
class StackedLowRank:
    """The same for stacked experts [E, out, in]: a [E r, in] has an expert's rows together, b [out, r E] has those of
    all experts side by side in each column of r; as PEFT stores them. transposed: the weight is [E, in, out]."""

    key: str
    a: Matrix
    b: Matrix
    scale: float
    num_experts: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (self.num_experts, *((columns, rows) if self.transposed else (rows, columns)))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.a.stored, self.b.stored

    @property
    def storage(self) -> Storage:
        return STORAGE

    def read(self) -> torch.Tensor:
        return torch.cat([self.read_slice(index) for index in range(self.num_experts)])

    def read_slice(self, index: int) -> torch.Tensor:
        a, b = self.a.read(), self.b.read()
        of_expert = a.view(self.num_experts, -1, a.shape[1])[index]
        product = (b.view(b.shape[0], -1, self.num_experts)[:, :, index] @ of_expert).mul_(self.scale)
        return (product.T if self.transposed else product)[None]

    def add_to(self, values: torch.Tensor) -> None:
        held = self.prepared()
        for index in range(self.num_experts):
            values[index : index + 1].add_(held.read_slice(index))

    def prepared(self) -> StackedLowRank:
        return replace(self, a=self.a.in_memory(), b=self.b.in_memory())


@dataclass(frozen=True, slots=True)
class Nothing:
    """Zeros in the place of a weight that the adapter leaves as it is, beside others that it changes."""

    key: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return ()

    @property
    def storage(self) -> Storage:
        return STORAGE

    def read(self) -> torch.Tensor:
        return torch.zeros(self.shape)

    def read_slice(self, index: int) -> torch.Tensor:
        return torch.zeros(1, *self.shape[1:])

    def add_to(self, values: torch.Tensor) -> None:
        """Nothing to add."""

    def prepared(self) -> Nothing:
        return self
