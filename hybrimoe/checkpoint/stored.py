"""What files of weights have in common, whatever their format: tensors that lie somewhere, and a header over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cpu_kernels import ExpertDtype


@dataclass(frozen=True, slots=True)
class Storage:
    """How the values of a weight lie in a checkpoint, and what they are best packed as.

    name: as people call it ("GPTQ int4, groups of 128, symmetric"). suits: the dtype for records of experts that are
    stored like this, None where nothing is quantised. remark: what packing them so changes.
    """

    name: str
    suits: ExpertDtype | None = None
    remark: str = ""

    def merged(self) -> Storage:
        """Of weights that an adapter is merged into, once they are dequantised."""
        if self.suits is None:
            return self
        return Storage(f"{self.name}, with an adapter", "int8", "rounded again")


class Stored(Protocol):
    """A tensor as it lies in a file."""

    @property
    def key(self) -> str:
        """Its name there."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape there, in torch's order."""

    @property
    def offset_bytes(self) -> int:
        """Where it starts in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""

    @property
    def type_name(self) -> str:
        """What the format calls the type of its values."""


class WeightFile(Protocol):
    """A file of weights, and what tells it from another of the same name."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def size_bytes(self) -> int:
        """Its size."""

    @property
    def header_sha256(self) -> str:
        """A hash of its header."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Its tensors, by name."""
