"""The weights of a model on disk, in any format: its files, and every tensor as a source of floating point values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hybrimoe.checkpoint.conversion import ConversionPlan, plan_as_named, plan_conversions
from hybrimoe.checkpoint.formats.dequantise import Source, dequantised
from hybrimoe.checkpoint.formats.quantisation import read_quantisation
from hybrimoe.checkpoint.gguf.file import open_gguf
from hybrimoe.checkpoint.gguf.weights import sources_of
from hybrimoe.checkpoint.pack import record_file
from hybrimoe.checkpoint.pack.manifest import Manifest, read_manifest
from hybrimoe.checkpoint.pack.sources import packed_sources
from hybrimoe.checkpoint.safetensors_file import open_checkpoint
from hybrimoe.checkpoint.stored import WeightFile
from hybrimoe.checkpoint.uneven import counts_of, fit_layers, uneven_counts


@dataclass(frozen=True, slots=True)
class Weights:
    """The opened files of a model.

    sources: by their names in the checkpoint, which transformers' mapping turns into parameters; with `as_named`, by
    the names of the parameters themselves. pack, folder: of a pack, whose packed weights become sources when the model
    is known; None of other checkpoints.
    """

    files: tuple[WeightFile, ...]
    sources: dict[str, Source]
    as_named: bool
    pack: Manifest | None = None
    folder: Path | None = None

    def stamps(self, sampled_keys: Collection[str]) -> list[Any]:
        """What tells this checkpoint from one with other weights: of a pack its identity, of others
        `record_file.stamps`."""
        return record_file.stamps(self.files, sampled_keys) if self.pack is None else [self.pack.identity]

    def plan(self, model: PreTrainedModel) -> ConversionPlan:
        """Which sources make which parameter of the (meta) model, whose layers get the number of experts that the
        checkpoint has of each. Raises CheckpointError for shapes that differ, ModelError for layers that cannot."""
        fit_layers(model, self._uneven_counts())
        if self.pack is not None and self.folder is not None:
            return plan_as_named(model, self.sources | packed_sources(self.folder, self.pack, model))
        return (plan_as_named if self.as_named else plan_conversions)(model, self.sources)

    def _uneven_counts(self) -> dict[int, int]:
        if self.pack is None:
            return uneven_counts(self.sources)
        return counts_of({str(layer["path"]): int(layer["num_experts"]) for layer in self.pack.layers})


def open_weights(path: Path, config: Mapping[str, Any]) -> Weights:
    """Opens the weights of a model directory or GGUF file and checks headers; no weight is read.

    config: what `read_config_dict` gives. Raises CheckpointError for missing, truncated or damaged files,
    UnsupportedCheckpointError for formats and quantisations that are not read.
    """
    if path.is_file():
        model = open_gguf(path)
        return Weights(model.files, dict(sources_of(model, config)), as_named=True)
    if (manifest := read_manifest(path)) is not None:
        checkpoint = open_checkpoint(path)
        return Weights(checkpoint.files, dict(checkpoint.tensors), as_named=True, pack=manifest, folder=path)
    quantisation = read_quantisation(path, config)
    checkpoint = open_checkpoint(path)
    return Weights(checkpoint.files, dequantised(checkpoint.tensors, quantisation), as_named=False)


def weight_stamps(path: Path) -> list[Any]:
    """What tells the weights of a model directory or GGUF file from others of the same name, size and time; headers and
    samples are read. Raises as `open_weights`."""
    if path.is_file():
        return record_file.stamps(open_gguf(path).files)
    manifest = read_manifest(path)
    return record_file.stamps(open_checkpoint(path).files) if manifest is None else [manifest.identity]
