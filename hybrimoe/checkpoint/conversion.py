"""From checkpoint keys to model parameters, by transformers' own conversion mapping, without loading anything.

`plan_conversions` renames every key as `from_pretrained` does and groups the sources of each parameter. A `Conversion`
then gives its parameters whole, or one expert's slice of them: where all operations of the mapping keep experts apart
(stacking per-expert tensors, joining gate and up, transposing, ...), only that expert's tensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from hybrimoe.checkpoint.errors import listed
from hybrimoe.checkpoint.formats.dequantise import Source
from hybrimoe.checkpoint.stored import Stored
from hybrimoe.errors import CheckpointError

WRAPPERS = re.compile(r"^(module\.|language_model\.(?=model\.|lm_head\.))+|(?<![^.])_orig_mod\.")
"""What data parallel training, a model with images, and torch.compile put into the names of weights."""


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """What operations of the mapping ask a model for: the configuration, and shapes of parameters.

    With `first_entries` each shape has 1 in its first dimension: the view of a single expert.
    """

    config: Any
    shapes: Mapping[str, torch.Size]
    first_entries: bool = False

    def get_parameter(self, name: str) -> torch.Tensor:
        """An empty parameter of the right shape. Raises AttributeError for a name that the model does not have."""
        if name not in self.shapes:
            raise AttributeError(name)
        shape = self.shapes[name]
        return torch.empty((1, *shape[1:]) if self.first_entries else shape, device="meta")


class Change(Protocol):
    """What an adapter makes of a parameter whose values are being read; it may write into what it is given."""

    def whole(self, key: str, values: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        """All of the parameter `key` as it is with the adapter."""

    def expert(self, key: str, index: int, entry: torch.Tensor, shapes: ModelShapes) -> torch.Tensor:
        """[1, ...]: expert `index` of it."""

    def prepared(self) -> Change:
        """The same, with what all experts of a layer need of the adapter in memory."""


@dataclass(slots=True)
class Conversion:
    """The sources of one parameter (or of several, for a converter with several targets).

    target: key of the (first) parameter. sources: by pattern of the converter, in natural order of their keys.
    changes: what adapters make of the parameters, by key, in the order in which they are done.
    """

    target: str
    converter: WeightConverter | None
    sources: dict[str, list[Source]] = field(default_factory=dict)
    changes: dict[str, list[Change]] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[str, ...]:
        """Keys of all parameters that this gives, where they can be told before converting."""
        if self.converter is None:
            return (self.target,)
        first, *_ = patterns = self.converter.target_patterns
        return tuple(self.target.replace(first, pattern, 1) for pattern in patterns)

    def source_keys(self) -> list[str]:
        """Keys of all sources."""
        return [source.key for group in self.sources.values() for source in group]

    def stored(self) -> list[Stored]:
        """The tensors of the files that all sources are made from."""
        return [stored for group in self.sources.values() for source in group for stored in source.stored]

    def whole(self, shapes: ModelShapes) -> dict[str, torch.Tensor]:
        """Every parameter of this conversion, by key."""
        given = self._convert({pattern: [s.read() for s in group] for pattern, group in self.sources.items()}, shapes)
        for key, changes in self.changes.items():
            for change in changes:
                given[key] = change.whole(key, given[key], shapes)
        return given

    def shapes_given(self, shapes: ModelShapes) -> dict[str, torch.Size]:
        """The shape of every parameter as the sources have it, by key; nothing is read. Raises CheckpointError for
        sources that do not go together."""
        empty = {p: [torch.empty(s.shape, device="meta") for s in group] for p, group in self.sources.items()}
        return {key: tensor.shape for key, tensor in self._convert(empty, shapes).items()}

    def prepared(self) -> Conversion:
        """The same, ready to give one expert after the other."""
        if not self.changes:
            return self
        return replace(self, changes={key: [one.prepared() for one in all_] for key, all_ in self.changes.items()})

    def keeps_experts_apart(self, num_experts: int) -> bool:
        """True where one expert's slice needs that expert's sources only."""
        if self.converter is None:
            return len(self.source_keys()) == 1
        if len(self.converter.target_patterns) != 1:
            return False
        merged = merges_experts(self.converter)
        counts = {len(group) for group in self.sources.values()}
        fits = counts == {num_experts} if merged else counts == {1} and self._stacked(num_experts)
        return fits and all(_keeps_first_dimension(op) for op in self.converter.operations)

    def expert(self, index: int, shapes: ModelShapes) -> torch.Tensor:
        """[1, ...]: expert `index` of the parameter. Only where `keeps_experts_apart`."""
        entry = self._expert(index, shapes)
        for change in self.changes.get(self.target, ()):
            entry = change.expert(self.target, index, entry, shapes)
        return entry

    def _expert(self, index: int, shapes: ModelShapes) -> torch.Tensor:
        if self.converter is None:
            return next(iter(self.sources.values()))[0].read_slice(index)
        if merges_experts(self.converter):
            tensors = {pattern: [group[index].read()] for pattern, group in self.sources.items()}
        else:
            tensors = {pattern: [group[0].read_slice(index)] for pattern, group in self.sources.items()}
        return next(iter(self._convert(tensors, shapes).values()))

    def _stacked(self, num_experts: int) -> bool:
        return all(
            s.shape[:1] == (num_experts,) and len(s.shape) == 3 for group in self.sources.values() for s in group
        )

    def _convert(self, tensors: dict[str, list[torch.Tensor]], shapes: ModelShapes) -> dict[str, torch.Tensor]:
        if self.converter is None:
            return {self.target: next(iter(tensors.values()))[0]}
        converter = deepcopy(self.converter)
        for pattern, group in tensors.items():
            for tensor in group:
                converter.add_tensor(self.target, pattern, pattern, lambda tensor=tensor: tensor)
        try:
            converted = converter.convert(self.target, model=shapes, config=shapes.config)
        except (ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{self.target} cannot be made from {listed(self.source_keys())}: {error};"
                " the checkpoint does not match its config.json"
            ) from error
        return {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """All conversions by target key, and the checkpoint's keys that no parameter takes."""

    conversions: dict[str, Conversion]
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Naming:
    """How transformers names the weights of a checkpoint when it loads them into a model, as `from_pretrained` does.

    parameters: of the model, by key.
    """

    parameters: dict[str, torch.Tensor]
    renamings: list[WeightRenaming]
    converters: list[WeightConverter]
    by_pattern: Mapping[str, WeightConverter]
    prefix: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> Naming:
        """The names of a (meta) model."""
        renamings, converters = _split(get_model_conversion_mapping(model))
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        return cls(model.state_dict(), renamings, converters, by_pattern, model.base_model_prefix)

    def place(self, key: str, known: Container[str] = ()) -> tuple[str, WeightConverter | None, str] | None:
        """(parameter that the weight `key` makes, or makes with others; the converter; its pattern, else the key), None
        where it makes none. known: other keys, which a wrapper's name is not taken off for."""
        renamed, pattern = self._renamed(key)
        if renamed not in self.parameters and key in self.parameters:
            renamed, pattern = key, None
        if renamed not in self.parameters and (bare := WRAPPERS.sub("", key)) != key and bare not in known:
            renamed, pattern = self._renamed(bare)
        if renamed not in self.parameters:
            return None
        return renamed, None if pattern is None else self.by_pattern[pattern], pattern or key

    def _renamed(self, key: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.parameters)
        return renamed, pattern


def plan_conversions(model: PreTrainedModel, sources: Mapping[str, Source]) -> ConversionPlan:
    """Groups `sources` by the parameter of the (meta) `model` that they make, as `from_pretrained` would."""
    naming = Naming.of(model)
    conversions: dict[str, Conversion] = {}
    unknown: list[str] = []
    for key in sorted(sources, key=dot_natural_key):
        place = naming.place(key, sources)
        if place is None:
            unknown.append(key)
            continue
        target, converter, pattern = place
        conversion = conversions.setdefault(target, Conversion(target, converter))
        conversion.sources.setdefault(pattern, []).append(sources[key])
    return ConversionPlan(conversions, tuple(unknown))


def plan_as_named(model: PreTrainedModel, sources: Mapping[str, Source]) -> ConversionPlan:
    """For `sources` that are parameters of the (meta) `model` already, by their names there.

    Raises CheckpointError for a shape that differs: here, before anything is read.
    """
    parameters = model.state_dict()
    conversions: dict[str, Conversion] = {}
    for key, source in sources.items():
        if key not in parameters:
            continue
        if source.shape != tuple(parameters[key].shape):
            raise CheckpointError(
                f"{key}: the configuration asks for shape {list(parameters[key].shape)}, the checkpoint gives"
                f" {list(source.shape)} ({source.key}); the file is damaged, or no conversion of a"
                f" {model.config.model_type} model"
            )
        conversions[key] = Conversion(key, None, {key: [source]})
    return ConversionPlan(conversions, tuple(source.key for key, source in sources.items() if key not in parameters))


def _split(transforms: Iterable[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    transforms = list(transforms)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in transforms if isinstance(entry, WeightConverter)]


def merges_experts(converter: WeightConverter) -> bool:
    """Whether a converter begins with joining tensors of single experts."""
    return isinstance(converter.operations[0], MergeModulelist)


def _keeps_first_dimension(operation: object) -> bool:
    """True for operations on [E, ., .] tensors that treat the entries of dimension 0 alike and apart."""
    match operation:
        case MergeModulelist():
            return bool(operation.dim == 0)
        case Concatenate() | Interleave() | Chunk():
            return operation.dim in (1, 2, -1, -2)
        case Transpose():
            return {operation.dim0, operation.dim1} <= {1, 2, -1, -2}
        case _:
            return False
