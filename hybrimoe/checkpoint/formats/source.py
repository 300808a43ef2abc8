"""A quantised weight as a source of plain ones: the tensors of the file that it is made of, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hybrimoe.checkpoint.safetensors_file import StoredTensor
from hybrimoe.checkpoint.stored import Storage

Parts = Mapping[str, StoredTensor]
Decode = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Takes the parts by name, of the whole weight or of one expert, and gives float32 values of the weight's shape."""

COLUMN_GROUPS = "g_idx"
"""The part that gives the group of each column, of all experts alike."""
KEPT = "codes stay, scales are rounded to bfloat16"
ROUNDED = "rounded again"


@dataclass(frozen=True, slots=True)
class DecodedSource:
    """A weight [N, K], or the weights [E, N, K] of stacked experts, read as float32.

    key: the parameter's name. parts: the tensors that it is made of.
    """

    key: str
    shape: tuple[int, ...]
    parts: Parts
    decode: Decode
    storage: Storage

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return tuple(self.parts.values())

    def read(self) -> torch.Tensor:
        return self.decode({name: part.read() for name, part in self.parts.items()})

    def read_slice(self, index: int) -> torch.Tensor:
        if len(self.shape) < 3:
            return self.read()[index : index + 1]
        return self.decode(
            {
                name: part.read_slice(index) if self._is_of_experts(name) else part.read()
                for name, part in self.parts.items()
            }
        )

    def _is_of_experts(self, part: str) -> bool:
        return part != COLUMN_GROUPS and self.parts[part].shape[:1] == self.shape[:1]


def grouped(values: torch.Tensor, columns: int, groups: torch.Tensor | None = None) -> torch.Tensor:
    """One value a group [..., G] for each of its columns: [..., columns] (or [..., 1], of one group).

    groups: [columns] the group of each column, where they do not follow each other in equal parts.
    """
    n_groups = values.shape[-1]
    if groups is not None:
        return values[..., groups.long()]
    if n_groups == 1:
        return values
    return values.repeat_interleave(-(-columns // n_groups), dim=-1)[..., :columns]
