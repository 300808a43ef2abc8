"""Packed experts on disk: what a store holds, in one file, so that the next start maps it instead of packing again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cpu_kernels import LAYOUT_VERSION, ExpertWeights
from cpu_kernels.host.mapped import MappedFile
from hybrimoe.checkpoint.pack import record_file
from hybrimoe.checkpoint.pack.record_file import Header
from hybrimoe.errors import CheckpointError
from hybrimoe.runtime.store import ByteArray, ExpertStore, LayerSpec, give_pages_back
from hybrimoe.runtime.tier.store import TieredStore

FORMAT_VERSION = 2


class MappedStore(ExpertStore):
    """A store over a mapped file, whose bytes may turn out to be lost when they are needed."""

    mapped: MappedFile
    path: Path

    @classmethod
    def over(cls, layers: Sequence[LayerSpec], mapped: MappedFile, path: Path) -> MappedStore:
        """The store of the records that lie in `mapped`, of the file `path`."""
        store = cls.from_buffer(layers, mapped.array)
        store.mapped, store.path = mapped, path
        return store

    is_own: ClassVar[bool] = False

    def release(self, layer: int, expert: int) -> None:
        """As `ExpertStore.release`; the file has the record, which may go on being read."""
        self.released_bytes += give_pages_back(self._records[layer][expert])

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """As `ExpertStore.read`. Raises CheckpointError as `check`."""
        weights = super().read(layer, expert)
        self.check()
        return weights

    def check(self) -> None:
        """As `ExpertStore.check`."""
        if self.mapped.n_lost_pages:
            raise CheckpointError(
                f"{self.path} was cut short, or its disk gives errors, while the experts in it were in use:"
                f" {self.mapped.n_lost_pages} pages of it did not come, and no reply can be trusted any more. Load the"
                " model again: packed experts that are not whole are packed anew (a pack must be converted anew)"
            )


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A whole packed file that fits the model: `open` maps it, `read` copies it to page-locked memory."""

    path: Path
    layers: tuple[LayerSpec, ...]
    offset_bytes: int

    def open(self) -> MappedStore:
        """A store over the mapped, read-only file. Raises CheckpointError where it cannot be mapped."""
        try:
            mapped = MappedFile(self.path, self.offset_bytes, _records_bytes(self.layers))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be mapped into memory: {error}; start again") from error
        return MappedStore.over(self.layers, mapped, self.path)

    def tiered(self, budget_bytes: int, usage_folders: Sequence[Path], *, pinned: bool) -> TieredStore:
        """A store that keeps as many experts as `budget_bytes` hold in memory and reads the others when they are
        needed. Raises BudgetError for too small a budget, CheckpointError where the file cannot be opened."""
        return TieredStore(
            self.layers, self.path, self.offset_bytes, budget_bytes, usage_folders=usage_folders, pinned=pinned
        )

    def read(self, progress: Callable[[int], None] = lambda n_bytes: None, *, pinned: bool = True) -> ExpertStore:
        """A store of its own, page-locked memory, filled from the file; for accelerators that copy from such memory.

        progress: called with the bytes read so far. Raises CheckpointError where the file is shorter than it was.
        """
        store = ExpertStore(self.layers, pinned=pinned)
        record_file.read(self.path, self.offset_bytes, store.buffer, progress)
        return store


def describe(layers: Sequence[LayerSpec], source: Sequence[Any], adapters: Sequence[str] = ()) -> Header:
    """The header that a packed file must have to stand for these layers. source: what tells the checkpoint that they
    were packed from (`Weights.stamps`). adapters: identities of those that are merged into them."""
    header: Header = {
        "format": FORMAT_VERSION,
        "layout": LAYOUT_VERSION,
        "layers": [
            {
                "path": layer.path,
                "num_experts": layer.num_experts,
                "hidden": layer.spec.hidden,
                "inter": layer.spec.inter,
                "dtype": layer.spec.dtype,
                "has_bias": layer.spec.has_bias,
                "gated": layer.spec.activation.gated,
                "record_bytes": layer.spec.record_bytes,
            }
            for layer in layers
        ],
        "source": list(source),
    }
    return record_file.with_adapters(header, adapters)


def file_name(header: Header) -> str:
    """Name of the packed file: the dtypes in it and a hash of layers, layout and adapters, so that variants lie side by
    side."""
    dtypes = {layer["dtype"] for layer in header["layers"]}
    return record_file.name_of("experts", dtypes, [header["layout"], header["layers"]], header)


def find(places: Sequence[Path], layers: tuple[LayerSpec, ...], header: Header) -> PackedFile | None:
    """The packed file for these layers in one of `places`; None where none is whole and fresh."""
    for place in places:
        path = place / file_name(header)
        offset_bytes = record_file.find(path, header, _records_bytes(layers))
        if offset_bytes is not None:
            return PackedFile(path, layers, offset_bytes)
    return None


def write(place: Path, records: ByteArray, header: Header) -> Path:
    """Writes a packed file into `place` (made if missing), returns its path. Raises OSError; then nothing is left."""
    path = place / file_name(header)
    record_file.write(path, records, header)
    return path


@contextlib.contextmanager
def fill(place: Path, layers: tuple[LayerSpec, ...], header: Header) -> Iterator[ExpertStore]:
    """A writable store over a packed file in the making, for experts that do not fit memory.

    The file is kept if the block ends well. Raises OSError; then nothing is left.
    """
    n_bytes, path = _records_bytes(layers), place / file_name(header)
    with record_file.whole_or_nothing(path, header, n_bytes) as (descriptor, offset_bytes):
        with os.fdopen(os.dup(descriptor), "r+b") as file:
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", offset=offset_bytes, shape=(n_bytes,))
        yield ExpertStore.from_buffer(layers, mapped)
        mapped.flush()


def _records_bytes(layers: Sequence[LayerSpec]) -> int:
    return sum(layer.nbytes for layer in layers)
