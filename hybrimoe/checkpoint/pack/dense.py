"""Packed dense layers on disk: what `cpu.dense_dtype` int8 or int4 makes of the linear layers around the experts.

They have a file of their own beside the packed experts, so that the experts, which are most of a model, are kept once
whatever the dense dtype is. The next start reads this file and not the weights that it was made from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cpu_kernels import LAYOUT_VERSION, pack_linear
from hybrimoe.checkpoint.pack import record_file
from hybrimoe.checkpoint.pack.record_file import Header
from hybrimoe.checkpoint.progress import Progress
from hybrimoe.dense.records import DenseRecords, LinearEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hybrimoe.checkpoint.conversion import Conversion, ModelShapes

FORMAT_VERSION = 1
PACKING, READING = "packing dense layers", "reading packed dense layers"


@dataclass(frozen=True, slots=True)
class DenseSource:
    """The linear layers of a model that are to be packed, and where their weights come from.

    late: conversions by weight key, of weights that go from the checkpoint into a record and are never in the model;
    weights that are not among them (tied ones, and those that come out of one tensor with others) are in the model.
    """

    entries: tuple[LinearEntry, ...]
    late: Mapping[str, Conversion]

    @classmethod
    def of(
        cls, model: PreTrainedModel, entries: Sequence[LinearEntry], conversions: Mapping[str, Conversion]
    ) -> DenseSource:
        """entries: as the model on the meta device has them; conversions: all of the checkpoint's, by target."""
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        keys = {entry.weight_key for entry in entries} - tied
        late = {
            key: conversion
            for conversion in conversions.values()
            if keys.issuperset(conversion.targets)
            for key in conversion.targets
        }
        return cls(tuple(entries), late)

    def stored_keys(self) -> set[str]:
        """Names of the checkpoint's tensors that `late` weights are made from."""
        return {stored.key for conversion in self.late.values() for stored in conversion.stored()}

    def without(self, paths: Collection[str]) -> DenseSource:
        """The layers that are not at `paths`."""
        kept = tuple(entry for entry in self.entries if entry.path not in paths)
        return DenseSource(kept, {key: c for key, c in self.late.items() if key.rpartition(".")[0] not in paths})

    def pack(
        self, model: nn.Module, shapes: ModelShapes, dtypes: Mapping[str, torch.dtype], show: Progress
    ) -> DenseRecords:
        """Reads and packs every layer, one at a time. Raises CheckpointError as `load_dense` does."""
        from hybrimoe.checkpoint.dense import read_checked  # transformers takes seconds, and files are read without it

        records, done = DenseRecords(self.entries), 0
        by_key = {entry.weight_key: entry for entry in self.entries}
        waiting = dict(by_key)
        while waiting:
            key = next(iter(waiting))
            weights = (
                read_checked(self.late[key], shapes, dtypes)
                if key in self.late
                else {key: model.get_parameter(key).detach()}
            )
            for name in [name for name in weights if name in waiting]:
                entry = waiting.pop(name)
                pack_linear(entry.spec, weights.pop(name), records.record(entry.path))
                done += entry.spec.record_bytes
                show(done, records.nbytes, PACKING)
        return records


def describe(source: DenseSource, checkpoint: Sequence[Any], adapters: Sequence[str] = ()) -> Header:
    """The header that a file must have to stand for these layers. checkpoint: what tells the checkpoint that they were
    packed from (`Weights.stamps`, with samples of `source.stored_keys`). adapters: identities of those that are merged
    into them."""
    header: Header = {
        "format": FORMAT_VERSION,
        "layout": LAYOUT_VERSION,
        "linears": [
            [e.path, e.spec.out_features, e.spec.in_features, e.spec.dtype, str(e.weight_dtype)] for e in source.entries
        ],
        "source": list(checkpoint),
    }
    return record_file.with_adapters(header, adapters)


def path_in(place: Path, source: DenseSource, header: Header) -> Path:
    """The file of these layers in a folder."""
    dtypes = {entry.spec.dtype for entry in source.entries}
    return place / record_file.name_of("dense", dtypes, [header["layout"], header["linears"]], header)


def read(places: Sequence[Path], source: DenseSource, header: Header, show: Progress) -> DenseRecords | None:
    """The records as one of `places` has them; None where none has them whole and fresh.

    Raises CheckpointError where the file is cut short meanwhile.
    """
    n_bytes = sum(entry.spec.record_bytes for entry in source.entries)
    for place in places:
        path = path_in(place, source, header)
        offset_bytes = record_file.find(path, header, n_bytes)
        if offset_bytes is not None:
            records = DenseRecords(source.entries)
            record_file.read(path, offset_bytes, records.buffer, lambda done: show(done, n_bytes, READING))
            return records
    return None


def write(place: Path, source: DenseSource, records: DenseRecords, header: Header) -> None:
    """Writes the file into `place` (made if missing). Raises OSError; then nothing is left."""
    record_file.write(path_in(place, source, header), records.buffer, header)
