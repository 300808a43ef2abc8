"""Finds what an adapter changes in a model and has it done while the weights are read: no weight is held twice.

Every weight of the adapter is named as transformers names the weights of checkpoints when it loads them, so that an
adapter of single experts (`experts.3.gate_proj`) fits stacked ones and the other way round, whatever the format of the
checkpoint is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from hybrimoe.checkpoint.adapters.changes import Added, Joined, Replaced, Rescaled
from hybrimoe.checkpoint.adapters.deltas import Delta, LowRank, Matrix, Nothing, StackedLowRank
from hybrimoe.checkpoint.adapters.file import Adapter, Factors
from hybrimoe.checkpoint.adapters.settings import MERGE_FIRST, TRANSPOSED_BEFORE
from hybrimoe.checkpoint.conversion import Change, Conversion, ConversionPlan, ModelShapes, Naming, merges_experts
from hybrimoe.checkpoint.errors import UnsupportedCheckpointError, listed
from hybrimoe.checkpoint.formats.dequantise import Source
from hybrimoe.errors import CheckpointError
from hybrimoe.experts.layout import find_experts

EXPERT_NUMBER = re.compile(r"\.(\d+)(?=\.)")
"""The last of a weight's name is its expert's."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What adapters change. identities: those of the adapters by the parameters that they change, in order."""

    identities: dict[str, list[str]] = field(default_factory=dict)

    def stamps(self, keys: Iterable[str]) -> list[str]:
        """The identities of the adapters that change any of these parameters, in order: what tells their packed form
        from that without adapters."""
        return list(dict.fromkeys(identity for key in keys for identity in self.identities.get(key, ())))


@dataclass(slots=True)
class Joining:
    """The deltas of weights that make one parameter together, by the converter's pattern and the number of the expert
    (0 where there are none)."""

    converter: WeightConverter
    deltas: dict[str, dict[int, LowRank]] = field(default_factory=dict)


def merge_adapters(model: PreTrainedModel, plan: ConversionPlan, adapters: Sequence[Adapter]) -> Merged:
    """Adds to the conversions of `plan` what adapters make of their parameters.

    model: on the meta device. Raises CheckpointError, before anything is read, for an adapter that changes what this
    model does not have, ranks and shapes that differ, and two adapters that replace the same weight;
    UnsupportedCheckpointError for what is not merged (DoRA of experts, weights that the embeddings share).
    """
    merged = Merged()
    for adapter in adapters:
        _Merging.of(model, plan, adapter, merged).run()
    return merged


@dataclass(frozen=True, slots=True)
class _Merging:
    """One adapter on its way into a plan. experts: the model's experts modules by path."""

    model: PreTrainedModel
    adapter: Adapter
    naming: Naming
    experts: dict[str, nn.Module]
    conversions: dict[str, Conversion]
    shapes: ModelShapes
    merged: Merged

    @classmethod
    def of(cls, model: PreTrainedModel, plan: ConversionPlan, adapter: Adapter, merged: Merged) -> _Merging:
        naming = Naming.of(model)
        by_target = {key: conversion for conversion in plan.conversions.values() for key in conversion.targets}
        shapes = ModelShapes(model.config, {key: value.shape for key, value in naming.parameters.items()})
        return cls(model, adapter, naming, dict(find_experts(model)), by_target, shapes, merged)

    def run(self) -> None:
        joinings: dict[str, Joining] = {}
        unknown = [key for key, tensor in self.adapter.full.items() if not self._replace(key, Replaced(tensor))]
        unknown += [one.module for one in self.adapter.factors if not self._add(one, joinings)]
        if unknown:
            raise CheckpointError(
                f"{self._named}: the model ({self.model.config.model_type}) has no {listed(sorted(unknown))}; the"
                f" adapter was made for {self.adapter.settings.base_model}"
            )
        for target, joining in joinings.items():
            self._join(target, joining)

    @property
    def _named(self) -> str:
        return str(self.adapter.settings.folder)

    def _replace(self, key: str, change: Replaced) -> bool:
        """False where the model has no such parameter."""
        place = self.naming.place(key)
        if place is None:
            return False
        target, converter, _ = place
        if converter is not None:
            raise UnsupportedCheckpointError(
                f"{self._named}: {key} replaces a part of {target}, which is not merged; {MERGE_FIRST}"
            )
        if target in self.merged.identities:
            raise CheckpointError(
                f"{self._named} replaces {target}, which another adapter changes, too; give one of them"
            )
        self._check_shape(key, change.stored.shape, target)
        self._attach(target, change)
        return True

    def _add(self, one: Factors, joinings: dict[str, Joining]) -> bool:
        """False where the model has no such module."""
        place = self.naming.place(f"{one.module}.down_proj")
        path = "" if place is None else place[0].removesuffix(".down_proj")
        if path in self.experts:
            self._add_stacked(one, path)
            return True
        place = self.naming.place(f"{one.module}.weight")
        if place is None or one.depth:
            return False
        target, converter, pattern = place
        module = self.model.get_submodule(target.rpartition(".")[0])
        transposed = one.of_embedding or (self.adapter.settings.fan_in_fan_out and isinstance(module, Conv1D))
        scale = self._scale(one, 1, one.module, f"{one.module}.weight")
        delta = LowRank(one.a.key, Matrix(one.a), Matrix(one.b), scale, transposed)
        if converter is None:
            self._check_shape(one.module, delta.shape, target)
            self._attach(target, self._plain(one, delta, target))
            return True
        if one.magnitude is not None:
            self._refuse_magnitude(one.module)
        index = int(EXPERT_NUMBER.findall(one.module)[-1]) if merges_experts(converter) else 0
        joinings.setdefault(target, Joining(converter)).deltas.setdefault(pattern, {})[index] = delta
        return True

    def _plain(self, one: Factors, delta: Delta, target: str) -> Change:
        if one.magnitude is None:
            return Added(delta)
        if one.of_embedding or one.magnitude.shape != delta.shape[:1]:
            self._refuse_magnitude(one.module)
        return Rescaled(delta, Matrix(one.magnitude))

    def _add_stacked(self, one: Factors, path: str) -> None:
        """Of an experts module, whose adapted parameters PEFT wraps in the order in which they stand there."""
        wanted = self.adapter.settings.target_parameters
        names = [name for name, _ in self.experts[path].named_parameters(recurse=False)]
        adapted = [name for name in names if any(f".{path}.{name}".endswith(f".{target}") for target in wanted)]
        if one.depth >= len(adapted):
            raise CheckpointError(
                f"{self._named}: {one.module} has {one.depth + 1} adapted parameters or more, and target_parameters of"
                f" adapter_config.json ({listed(sorted(wanted)) or 'empty'}) names {len(adapted)} of it"
            )
        target = f"{path}.{adapted[len(adapted) - 1 - one.depth]}"
        if one.magnitude is not None:
            self._refuse_magnitude(one.module)
        shape = tuple(self.shapes.shapes[target])
        scale = self._scale(one, shape[0] if len(shape) == 3 else 1, target)
        a, b = Matrix(one.a), Matrix(one.b)
        delta: Delta = LowRank(one.a.key, a, b, scale)
        if len(shape) == 3:
            delta = StackedLowRank(one.a.key, a, b, scale, shape[0], self._is_transposed(one, shape, path))
        self._check_shape(one.module, delta.shape, target)
        self._attach(target, Added(delta))

    def _is_transposed(self, one: Factors, shape: tuple[int, ...], path: str) -> bool:
        """Whether b a is the change of an expert [in, out]. The shapes tell, or for square experts who wrote it."""
        rows, columns = one.b.shape[0], one.a.shape[1]
        if rows != columns:
            return (columns, rows) == shape[1:]
        old = () < self.adapter.settings.peft_version < TRANSPOSED_BEFORE
        return old or bool(getattr(self.experts[path], "is_transposed", False))

    def _scale(self, one: Factors, num_experts: int, *names: str) -> float:
        """What b a is multiplied by. Raises CheckpointError for ranks that differ."""
        settings = self.adapter.settings
        rank = settings.rank_of(*names)
        if (one.a.shape[0], one.b.shape[1]) != (rank * num_experts, rank * num_experts):
            of_all = f" x {num_experts} experts" if num_experts > 1 else ""
            raise CheckpointError(
                f"{self._named}: {one.module} has matrices {list(one.a.shape)} and {list(one.b.shape)};"
                f" adapter_config.json gives it rank {rank}{of_all}: another adapter's file, or another model's"
            )
        return settings.scaling_of(rank, *names)

    def _join(self, target: str, joining: Joining) -> None:
        """Weights of which the model's mapping makes one parameter, or several."""
        base = self.conversions.get(target)
        sources: dict[str, list[Source]] = {}
        n_experts = self.shapes.shapes[target][0]
        joined = base is not None and base.converter is not None
        if joined and base is not None and merges_experts(joining.converter):
            n_experts = max(map(len, base.sources.values()))
        some = next(delta for deltas in joining.deltas.values() for delta in deltas.values())
        for pattern in joining.converter.source_patterns:
            deltas = joining.deltas.get(pattern, {})
            of_base = base.sources.get(pattern, ()) if joined and base is not None else ()
            shape = next((delta.shape for delta in deltas.values()), of_base[0].shape if of_base else some.shape)
            if merges_experts(joining.converter):
                if max(deltas, default=0) >= n_experts:
                    raise CheckpointError(
                        f"{self._named} changes expert {max(deltas)} of {target}, which has {n_experts} experts; the"
                        f" adapter was made for {self.adapter.settings.base_model}"
                    )
                sources[pattern] = [deltas.get(index, Nothing(pattern, shape)) for index in range(n_experts)]
            else:
                sources[pattern] = [deltas.get(0, Nothing(pattern, shape))]
        conversion = Conversion(target, joining.converter, sources)
        try:
            given = conversion.shapes_given(self.shapes)
        except CheckpointError as error:
            raise CheckpointError(f"{self._named}: {error}") from error
        for key, shape in given.items():
            self._check_shape(some.key, tuple(shape), key)
            self._attach(key, Joined(conversion, n_experts))

    def _check_shape(self, what: str, found: tuple[int, ...], target: str) -> None:
        expected = tuple(self.shapes.shapes[target])
        if tuple(found) != expected:
            raise CheckpointError(
                f"{self._named}: {what} is for a weight {list(found)}, the model's {target} is {list(expected)}; the"
                f" adapter was made for {self.adapter.settings.base_model}"
            )

    def _attach(self, target: str, change: Change) -> None:
        tied = self.model.all_tied_weights_keys
        if target in tied or target in tied.values():
            raise UnsupportedCheckpointError(
                f"{self._named} changes {target}, which input embeddings and output layer of this model share, so that"
                f" both would change; {MERGE_FIRST}"
            )
        if target not in self.conversions:
            raise CheckpointError(f"{self._named} changes {target}, for which the checkpoint has no weights")
        self.conversions[target].changes.setdefault(target, []).append(change)
        identities = self.merged.identities.setdefault(target, [])
        if self.adapter.identity not in identities:
            identities.append(self.adapter.identity)

    def _refuse_magnitude(self, module: str) -> None:
        raise UnsupportedCheckpointError(
            f"{self._named}: DoRA (use_dora) of {module} is not merged, only that of whole linear layers; {MERGE_FIRST}"
        )
