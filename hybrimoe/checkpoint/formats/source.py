"""A quantised weight as a source of plain ones: the tensors of the file that it is made of, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hybrimoe.checkpoint.safetensors_file import StoredTensor
from hybrimoe.checkpoint.stored import Storage

if TYPE_CHECKING:
    from cpu_kernels import ExpertDtype

Parts = Mapping[str, StoredTensor]
Decode = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Takes the parts by name, of the whole weight or of one expert, and gives float32 values of the weight's shape."""

COLUMN_GROUPS = "g_idx"
"""The part that gives the group of each column, of all experts alike."""
KEPT = "codes stay, scales are rounded to bfloat16"
RECORD_GROUP = 32  # columns that share a scale in records of ours (cpu_kernels.format.layout.GROUP)
KEEPS: dict[int, ExpertDtype] = {1: "int2", 2: "int2", 3: "int3", 4: "int4", 5: "int5", 6: "int6"}
"""Bits of symmetric codes -> the smallest records that have room for them. Codes of 7 and 8 bits are rounded again."""
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


def scaled(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """(codes - zeros) x scales, float32 [..., K], in no more memory than that: codes that are float32 become it.

    scales, zeros: [..., G], one for each group of columns, as `grouped` has them.
    """
    values, columns = codes.float(), codes.shape[-1]
    if groups is None and columns % scales.shape[-1] == 0:
        by_group = values.unflatten(-1, (scales.shape[-1], -1))
        if zeros is not None:
            by_group -= zeros[..., None]
        by_group *= scales[..., None]
        return values
    if zeros is not None:
        values -= grouped(zeros, columns, groups)
    values *= grouped(scales, columns, groups)
    return values


def storage_of_groups(name: str, bits: int, columns: int, n_groups: int, *, symmetric: bool, ordered: bool) -> Storage:
    """How rows of codes lie in a checkpoint, and the records that suit them. n_groups: of a row, each with a scale;
    ordered: columns of a group are not neighbours (act-order)."""
    group = -(-columns // n_groups)
    of_groups = "a scale a row" if n_groups == 1 else f"groups of {group}"
    ways = ["symmetric" if symmetric else "zero points", *(["act-order"] if ordered else [])]
    name = f"{name}, {of_groups}, {', '.join(ways)}"
    keeps = symmetric and not ordered and bits in KEEPS and (n_groups == 1 or group % RECORD_GROUP == 0)
    return Storage(name, KEEPS[bits], KEPT) if keeps else Storage(name, "int8", ROUNDED)
