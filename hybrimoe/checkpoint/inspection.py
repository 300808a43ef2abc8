"""What a checkpoint holds, and what its packed form costs: bytes of each type, and the error of records, measured on
some of its experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from cpu_kernels import DTYPES, ExpertDtype, ExpertWeights, pack_expert, unpack_expert
from hybrimoe.checkpoint.adapters.file import Adapter, open_adapter
from hybrimoe.checkpoint.adapters.merging import Merged, merge_adapters
from hybrimoe.checkpoint.choice import ExpertChoice, choose_expert_dtype
from hybrimoe.checkpoint.conversion import ConversionPlan, ModelShapes
from hybrimoe.checkpoint.dense import dense_dtype, meta_model, read_config
from hybrimoe.checkpoint.experts import LayerSource, layer_sources
from hybrimoe.checkpoint.formats.dequantise import Source
from hybrimoe.checkpoint.source import model_path, read_config_dict
from hybrimoe.checkpoint.weights import open_weights
from hybrimoe.compat import has_processor
from hybrimoe.errors import ModelError
from hybrimoe.experts.layout import find_experts, read

SAMPLED_LAYERS = 3
"""Layers (first, middle, last) of which an expert is packed to measure the error."""


@dataclass(frozen=True, slots=True)
class TypeTotals:
    """All weights of one type or quantised format: how many tensors, of how many weights, in how many bytes."""

    type_name: str
    n_tensors: int
    n_values: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class RecordCost:
    """The experts as records of a dtype: bytes of all, and the error that packing adds to what the file says.

    error: root mean square of the difference over that of the weights, of the sampled experts together; 0 is exact.
    """

    dtype: str
    n_bytes: int
    error: float


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """An adapter, and how many parameters of the model it changes: stacked experts, and others."""

    path: str
    scale: float
    ranks: tuple[int, ...]
    base_model: str
    n_experts: int
    n_others: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint. files: by name, with their bytes. other: tensors that the model has no place for. choice: what
    experts are packed as where nobody says a dtype. records: of the experts with the adapters, if there are any."""

    path: str
    model_type: str
    files: dict[str, int]
    experts: tuple[TypeTotals, ...]
    dense: tuple[TypeTotals, ...]
    records: tuple[RecordCost, ...]
    choice: ExpertChoice
    sampled_experts: tuple[str, ...]
    other: tuple[str, ...]
    adapters: tuple[AdapterSummary, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def inspect(path_or_hub_id: str | Path | None = None, adapters: Sequence[str] = ()) -> Inspection:
    """Reads headers, and the experts that the error is measured on. adapters: `DIR` or `DIR:SCALE`, which are merged.
    Errors as `hybrimoe.load`."""
    path = model_path(path_or_hub_id)
    opened = [open_adapter(name) for name in adapters]
    raw_config = read_config_dict(path)
    weights = open_weights(path, raw_config)
    config = read_config(path)
    model = meta_model(config, dense_dtype("auto", config), whole=has_processor(path))
    plan = weights.plan(model)
    merged = merge_adapters(model, plan, opened)
    sources = layer_sources({name: read(module) for name, module in find_experts(model)}, plan.conversions)
    if not sources:
        raise ModelError(f"{path} is a dense model ({config.model_type}): it has no experts to place")
    in_experts = {key for source in sources for c in source.parameters.values() for key in c.source_keys()}
    found = _sources(plan)
    sampled = _sampled(model, sources)
    return Inspection(
        path=str(path),
        model_type=str(config.model_type),
        files={file.path.name: file.size_bytes for file in weights.files},
        experts=_totals(source for source in found if source.key in in_experts),
        dense=_totals(source for source in found if source.key not in in_experts),
        records=tuple(_cost(dtype, sources, [expert for _, expert in sampled]) for dtype in DTYPES),
        choice=choose_expert_dtype(None, sources),
        sampled_experts=tuple(name for name, _ in sampled),
        other=plan.unknown,
        adapters=tuple(_summary(one, merged, [source.path for source in sources]) for one in opened),
    )


def _summary(adapter: Adapter, merged: Merged, experts: Sequence[str]) -> AdapterSummary:
    changed = [key for key, identities in merged.identities.items() if adapter.identity in identities]
    n_experts = sum(key.rpartition(".")[0] in experts for key in changed)
    settings = adapter.settings
    return AdapterSummary(
        str(settings.folder), settings.scale, adapter.ranks, settings.base_model, n_experts, len(changed) - n_experts
    )


def _sources(plan: ConversionPlan) -> list[Source]:
    """Every weight once: an output layer and embeddings may be made from the same. Numbers of the metadata are none."""
    groups = [group for conversion in plan.conversions.values() for group in conversion.sources.values()]
    return list({source.key: source for group in groups for source in group if source.stored}.values())


def _totals(sources: Iterable[Source]) -> tuple[TypeTotals, ...]:
    """Most bytes first."""
    by_type: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for source in sources:
        for name, *sizes in _sizes(source):
            by_type[name].append((sizes[0], sizes[1], sizes[2]))
    totals = [TypeTotals(name, *(sum(column) for column in zip(*rows, strict=True))) for name, rows in by_type.items()]
    return tuple(sorted(totals, key=lambda total: (-total.n_bytes, total.type_name)))


def _sizes(source: Source) -> list[tuple[str, int, int, int]]:
    """(type, tensors, weights, bytes) of each tensor of a weight, or of all together where they are one format."""
    name = source.storage.name
    if name in {tensor.type_name for tensor in source.stored}:
        return [(tensor.type_name, 1, prod(tensor.shape), tensor.nbytes) for tensor in source.stored]
    return [(name, len(source.stored), prod(source.shape), sum(tensor.nbytes for tensor in source.stored))]


Sample = tuple[LayerSource, ExpertWeights]


def _sampled(model: PreTrainedModel, sources: Sequence[LayerSource]) -> list[tuple[str, Sample]]:
    """(name, (layer, weights)) of the middle expert of some layers."""
    shapes = ModelShapes(model.config, {name: tensor.shape for name, tensor in model.state_dict().items()})
    places = sorted({0, len(sources) // 2, len(sources) - 1})[:SAMPLED_LAYERS]
    found = []
    for source in (sources[place] for place in places):
        index = source.num_experts // 2
        found.append((f"{source.path}, expert {index}", (source, source.reader(shapes).expert(index))))
    return found


def _cost(dtype: ExpertDtype, sources: Sequence[LayerSource], sampled: Sequence[Sample]) -> RecordCost:
    n_bytes = sum(source.num_experts * source.layout.spec(dtype).record_bytes for source in sources)
    off = total = 0.0
    for source, weights in sampled:
        spec = source.layout.spec(dtype)
        record = np.empty(spec.record_bytes, np.uint8)
        pack_expert(spec, weights, record)
        packed = unpack_expert(spec, record)
        for name in ("gate", "up", "down"):
            if (matrix := getattr(weights, name)) is not None:
                off += float((getattr(packed, name).double() - matrix.double()).square().sum())
                total += float(matrix.double().square().sum())
    return RecordCost(dtype, n_bytes, sqrt(off / total) if total else 0.0)
