"""The weights of a pack as sources: what lies there as it is, and packed records, which are dequantised when read.

A start with the dtypes of the pack maps or reads the records themselves and never asks these; another dtype, rules that
leave experts in the model's own form, and a card that takes dense layers unpacked do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from cpu_kernels import DTYPES, ExpertDtype, ExpertSpec, ExpertWeights, LinearSpec, unpack_expert, unpack_linear
from hybrimoe.checkpoint.formats.dequantise import Source
from hybrimoe.checkpoint.pack import dense as packed_dense
from hybrimoe.checkpoint.pack import experts as packed
from hybrimoe.checkpoint.pack import record_file
from hybrimoe.checkpoint.pack.manifest import Manifest
from hybrimoe.checkpoint.pack.record_file import Header
from hybrimoe.checkpoint.reading import read_bytes
from hybrimoe.checkpoint.stored import Storage
from hybrimoe.errors import CheckpointError
from hybrimoe.experts.layout import ExpertsLayout, find_experts, read


@dataclass(frozen=True, slots=True)
class Record:
    """A record, or the records of all experts of a layer, as they lie in a file."""

    key: str
    file: Path
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int
    type_name: str

    def read(self, index: int = 0, n_bytes: int | None = None) -> torch.Tensor:
        """uint8: all of it, or the `index`th part of `n_bytes`. Raises CheckpointError where the file ends before."""
        size = self.nbytes if n_bytes is None else n_bytes
        return read_bytes(self.file, self.key, self.offset_bytes + index * size, size)


@dataclass(frozen=True, slots=True)
class LinearSource:
    """A packed linear layer's weight, float32 [out, in]."""

    record: Record
    spec: LinearSpec

    @property
    def key(self) -> str:
        return self.record.key

    @property
    def shape(self) -> tuple[int, ...]:
        return self.record.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def stored(self) -> tuple[Record, ...]:
        return (self.record,)

    @property
    def storage(self) -> Storage:
        return Storage(self.record.type_name)

    def read(self) -> torch.Tensor:
        return unpack_linear(self.spec, self.record.read())

    def read_slice(self, index: int) -> torch.Tensor:
        return self.read()[index : index + 1]


@dataclass(frozen=True, slots=True)
class ExpertsSource:
    """A parameter of packed experts, `name` of the module that `layout` describes, float32 [E, ...].

    record: all experts of the layer. suits: the dtype that the pack's experts have.
    """

    key: str
    name: str
    shape: tuple[int, ...]
    layout: ExpertsLayout
    spec: ExpertSpec
    record: Record
    suits: ExpertDtype

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def stored(self) -> tuple[Record, ...]:
        """Its share of the records, so that the parameters of a layer together are all of them."""
        parts, layout = self.layout.num_experts, self.spec.layout
        sizes = {"down_proj": layout.down_end - layout.down_offset, "gate_up_proj": layout.down_offset,
                 "up_proj": layout.down_offset}  # fmt: skip
        n_bytes = parts * sizes.get(self.name, math.prod(self.shape[1:]) * 4)
        return (dataclasses.replace(self.record, key=self.key, shape=self.shape, nbytes=n_bytes),)

    @property
    def storage(self) -> Storage:
        return Storage(self.record.type_name, self.suits, "they are packed already")

    def read(self) -> torch.Tensor:
        return torch.cat([self.read_slice(index) for index in range(self.shape[0])])

    def read_slice(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.shape[0]:
            raise CheckpointError(f"{self.key} has {self.shape[0]} experts, expert {index} was asked for")
        record = self.record.read(index, self.spec.record_bytes)
        return as_parameters(self.layout, unpack_expert(self.spec, record))[self.name]


def as_parameters(layout: ExpertsLayout, weights: ExpertWeights) -> dict[str, torch.Tensor]:
    """One expert in the form of its module's parameters, each [1, ...], in the dtype of `weights`."""
    entries = {
        name: torch.zeros((1, *parameter.shape[1:]), dtype=weights.down.dtype)
        for name, parameter in layout.module.named_parameters(recurse=False)
    }
    holder: Any = SimpleNamespace(**entries)
    dataclasses.replace(layout, module=holder).assign(0, weights)
    return entries


def headers(manifest: Manifest) -> tuple[Header, Header]:
    """What the record files of experts and of dense layers say of themselves."""
    source = [manifest.identity]
    experts = {
        "format": packed.FORMAT_VERSION, "layout": manifest.layout, "layers": manifest.layers, "source": source
    }  # fmt: skip
    dense = {
        "format": packed_dense.FORMAT_VERSION, "layout": manifest.layout, "linears": manifest.linears, "source": source
    }  # fmt: skip
    return experts, dense


def packed_sources(folder: Path, manifest: Manifest, model: PreTrainedModel) -> dict[str, Source]:
    """The packed parameters of the (meta) `model` by their names.

    Raises CheckpointError where a record file is missing, cut short, or belongs to another model.
    """
    found: dict[str, Source] = {}
    expert_header, dense_header = headers(manifest)
    layouts = {path: read(module) for path, module in find_experts(model)}
    if manifest.experts is not None:
        sizes = [layer["num_experts"] * layer["record_bytes"] for layer in manifest.layers]
        offset = record_start(folder / manifest.experts, expert_header, sum(sizes))
        for layer, n_bytes in zip(manifest.layers, sizes, strict=True):
            found |= _experts(folder / manifest.experts, layer, manifest, layouts, offset, n_bytes)
            offset += n_bytes
    if manifest.dense is not None:
        specs = [LinearSpec(columns, rows, dtype) for _, rows, columns, dtype, _ in manifest.linears]
        offset = record_start(folder / manifest.dense, dense_header, sum(spec.record_bytes for spec in specs))
        for (path, rows, columns, dtype, _), spec in zip(manifest.linears, specs, strict=True):
            key = f"{path}.weight"
            name = f"packed {dtype}"
            record = Record(key, folder / manifest.dense, (rows, columns), offset, spec.record_bytes, name)
            found[key] = LinearSource(record, spec)
            offset += spec.record_bytes
    return found


def record_start(file: Path, header: Header, n_bytes: int) -> int:
    """Where the records of a pack's file start. Raises CheckpointError where it is not whole."""
    offset = record_file.find(file, header, n_bytes)
    if offset is None:
        raise CheckpointError(
            f"{file} is missing, cut short, or of another pack; copy the pack again, or `hybrimoe convert` the model"
            " again (`hybrimoe verify` names what is damaged)"
        )
    return offset


def _experts(
    file: Path, layer: Mapping[str, Any], manifest: Manifest, layouts: Mapping[str, ExpertsLayout], offset: int,
    n_bytes: int,
) -> dict[str, Source]:  # fmt: skip
    path = str(layer["path"])
    layout = layouts.get(path)
    spec = None if layout is None else layout.spec(layer["dtype"])
    if layout is None or spec is None or spec.record_bytes != layer["record_bytes"]:
        raise CheckpointError(
            f"{file} has experts for {path}, which are not those that config.json beside it describes"
        )
    suits = next(dtype for dtype in DTYPES if dtype == manifest.expert_dtype)
    record = Record(path, file, (layout.num_experts,), offset, n_bytes, f"packed {spec.dtype}")
    return {
        f"{path}.{name}": ExpertsSource(
            f"{path}.{name}", name, tuple(parameter.shape), layout, spec, record, suits
        )
        for name, parameter in layout.module.named_parameters(recurse=False)
    }  # fmt: skip
