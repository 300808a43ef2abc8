"""Streams the experts of a checkpoint into a store: one at a time in the normal form that is packed, a few at once,
each on one thread of its own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from cpu_kernels import ExpertWeights
from cpu_kernels.host.threads import torch_threads
from hybrimoe.checkpoint.conversion import Conversion, ModelShapes
from hybrimoe.checkpoint.errors import listed
from hybrimoe.checkpoint.progress import Progress
from hybrimoe.checkpoint.stored import Storage
from hybrimoe.errors import CheckpointError
from hybrimoe.experts.layout import ExpertsLayout
from hybrimoe.runtime.store import ExpertStore, LayerSpec

MAX_WORKERS = 8  # beyond it, disk and memory bandwidth decide
WORKER_BYTES_PER_WEIGHT = 16
"""Of an expert while it is read and packed: 4 to 8 bytes are counted (as the file has it or decoded, matrices alone and
joined), 9 to 14 measured, since the C library keeps what was freed."""


@dataclass(frozen=True, slots=True)
class LayerSource:
    """Where the experts of one layer come from: a conversion for each parameter of the replaced module."""

    path: str
    layout: ExpertsLayout
    parameters: dict[str, Conversion]

    @property
    def num_experts(self) -> int:
        """Experts of this layer."""
        return self.layout.num_experts

    def reader(self, shapes: ModelShapes) -> ExpertReader:
        """Prepares reading; what cannot be read expert by expert is read now, as a whole layer."""
        apart = {name: self._is_apart(c) for name, c in self.parameters.items()}
        whole = {name: self._whole(name, shapes) for name in self.parameters if not apart[name]}
        one = dataclasses.replace(self, parameters={name: c.prepared() for name, c in self.parameters.items()})
        return ExpertReader(one, dataclasses.replace(shapes, first_entries=True), whole)

    def _is_apart(self, conversion: Conversion) -> bool:
        """Whether an expert's entry is read without the others; the checkpoint may have entries of identity experts."""
        return any(conversion.keeps_experts_apart(count) for count in self.entry_counts)

    @property
    def entry_counts(self) -> set[int]:
        """How many entries a parameter may have in a checkpoint: with or without those of identity experts, which
        nothing reads (LongCat-Flash's own files have none, transformers writes them)."""
        return {self.num_experts, self.num_experts + self.layout.num_identity}

    def storages(self) -> set[Storage]:
        """How the weights of the experts lie in the checkpoint; biases do not count.

        Quantised ones that an adapter changes are no longer the values that their codes stood for.
        """
        matrices = [conversion for name, conversion in self.parameters.items() if not name.endswith("bias")]
        return {
            source.storage.merged() if conversion.changes else source.storage
            for conversion in matrices
            for group in conversion.sources.values()
            for source in group
        }

    def source_keys(self, index: int) -> list[str]:
        """Names of the checkpoint's tensors that expert `index` is made from (all of the layer's where fused)."""
        names: list[str] = []
        for conversion in self.parameters.values():
            for group in conversion.sources.values():
                names += [group[index].key] if len(group) in self.entry_counts else [source.key for source in group]
        return names

    def _whole(self, name: str, shapes: ModelShapes) -> torch.Tensor:
        tensor = self.parameters[name].whole(shapes)[f"{self.path}.{name}"]
        if tensor.shape != shapes.shapes[f"{self.path}.{name}"]:
            raise self.mismatch(name, tuple(tensor.shape), tuple(shapes.shapes[f"{self.path}.{name}"]))
        return tensor

    def mismatch(
        self, name: str, found: tuple[int, ...], expected: tuple[int, ...], index: int | None = None
    ) -> CheckpointError:
        keys = self.parameters[name].source_keys() if index is None else self.source_keys(index)
        which = f"{self.path}.{name}" + ("" if index is None else f", expert {index}")
        return CheckpointError(
            f"{which}: config.json asks for shape {list(expected)}, the checkpoint gives {list(found)} ({listed(keys)})"
        )


@dataclass(frozen=True, slots=True)
class ExpertReader:
    """Reads single experts of a layer; safe to use from several threads."""

    source: LayerSource
    shapes: ModelShapes
    whole: dict[str, torch.Tensor]

    def expert(self, index: int) -> ExpertWeights:
        """Expert `index` in normal form. Raises CheckpointError for a shape or dtype that does not match."""
        entries = {
            name: self.whole[name][index : index + 1] if name in self.whole else conversion.expert(index, self.shapes)
            for name, conversion in self.source.parameters.items()
        }
        for name, entry in entries.items():
            self._check(name, index, entry)
        return dataclasses.replace(self.source.layout, module=_holder(entries)).expert(0)

    def _check(self, name: str, index: int, entry: torch.Tensor) -> None:
        expected = self.shapes.get_parameter(f"{self.source.path}.{name}").shape
        if entry.shape != expected:
            raise self.source.mismatch(name, tuple(entry.shape[1:]), tuple(expected[1:]), index)
        if not entry.is_floating_point():
            raise CheckpointError(
                f"{listed(self.source.source_keys(index))}: expected floating point weights, found {entry.dtype};"
                " the checkpoint is quantised in a way that is not read"
            )


def layer_sources(layouts: Mapping[str, ExpertsLayout], conversions: Mapping[str, Conversion]) -> list[LayerSource]:
    """The sources of each experts module. Raises CheckpointError where a parameter or an expert is missing."""
    by_parameter = {target: conversion for conversion in conversions.values() for target in conversion.targets}
    sources: list[LayerSource] = []
    for path, layout in layouts.items():
        names = [name for name, _ in layout.module.named_parameters(recurse=False)]
        if missing := [f"{path}.{name}" for name in names if f"{path}.{name}" not in by_parameter]:
            raise CheckpointError(
                f"the checkpoint lacks the experts' weights {listed(missing)}; fetch the missing shards"
            )
        source = LayerSource(path, layout, {name: by_parameter[f"{path}.{name}"] for name in names})
        _check_counts(source)
        sources.append(source)
    return sources


def _check_counts(source: LayerSource) -> None:
    """Per-expert tensors must be there once per expert."""
    for name, conversion in source.parameters.items():
        counts = {pattern: len(group) for pattern, group in conversion.sources.items()}
        patterns = () if conversion.converter is None else conversion.converter.source_patterns
        # Scales beside weights (`w13_weight_scale` of `w13_weight`) are there where the weights are quantised.
        lacking = sorted(name for name in patterns if name not in counts and not name.startswith(tuple(counts)))
        if lacking:
            raise CheckpointError(f"{source.path}.{name}: the checkpoint has no tensors like {listed(lacking)}")
        if len(set(counts.values())) > 1 or (
            conversion.converter is not None
            and len(conversion.converter.target_patterns) == 1
            and not set(counts.values()) <= {1, *source.entry_counts}
        ):
            found = ", ".join(f"{count} like {pattern}" for pattern, count in counts.items())
            raise CheckpointError(
                f"{source.path}.{name}: config.json asks for {source.num_experts} experts, the checkpoint has {found};"
                " a shard is missing or config.json belongs to another model"
            )


def _holder(entries: dict[str, torch.Tensor]) -> Any:
    """Looks like an experts module with one expert."""
    return SimpleNamespace(**entries)


def pack_experts(store: ExpertStore, sources: Sequence[LayerSource], shapes: ModelShapes, show: Progress) -> None:
    """Reads every layer of `store` from its source (by path) and packs it.

    In memory at a time, beside the store: a few experts, less than one layer as it is packed (where even one expert is
    more than that, one). `show` is called from this thread. Raises CheckpointError for what does not match or is not
    finite, naming the checkpoint's tensors.
    """
    by_path = {source.path: source for source in sources}
    done = 0
    for layer, spec in enumerate(store.layers):
        reader = by_path[spec.path].reader(shapes)
        with ThreadPoolExecutor(_workers(spec)) as pool:
            for _ in pool.map(partial(_pack_one, store, layer, reader), range(spec.num_experts)):
                done += spec.spec.record_bytes
                show(done, store.nbytes, "packing experts")


def _workers(layer: LayerSpec) -> int:
    """Threads that pack a layer: so many that the experts in their hands take less than the packed layer."""
    matrices = 3 if layer.spec.activation.gated else 2
    worker_bytes = WORKER_BYTES_PER_WEIGHT * matrices * layer.spec.hidden * layer.spec.inter
    return max(1, min(os.cpu_count() or 1, MAX_WORKERS, layer.nbytes // worker_bytes))


def _pack_one(store: ExpertStore, layer: int, reader: ExpertReader, expert: int) -> None:
    try:
        with torch_threads(1):
            store.write(layer, expert, reader.expert(expert))
    except CheckpointError as error:
        names = listed(reader.source.source_keys(expert))
        if names in str(error):
            raise
        raise CheckpointError(f"{error} (from {names})") from error
