"""The parameters of a model from the tensors of its GGUF file: named, put together, and read only when asked for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hybrimoe.checkpoint.gguf.arrangements import Join, join_of
from hybrimoe.checkpoint.gguf.config import num_hidden_layers
from hybrimoe.checkpoint.gguf.decoding import DecodedTensor
from hybrimoe.checkpoint.gguf.families import family_of
from hybrimoe.checkpoint.gguf.fields import Fields
from hybrimoe.checkpoint.gguf.file import GgufModel, GgufTensor
from hybrimoe.checkpoint.gguf.places import SHARED_PLACES, WHOLE_MODEL, Place
from hybrimoe.checkpoint.gguf.streamed_layers import NGRAM_LAYERS, NGRAM_TABLE, ngram_layer
from hybrimoe.checkpoint.stored import Storage
from hybrimoe.errors import CheckpointError

LAYER = re.compile(r"^blk\.(\d+)\.(.+)$")
INSIDE, INSIDE_WRAPPER = re.compile(r"^model\."), "model.language_model."
UNUSED = re.compile(r"^(blk\.\d+\.attn_rot_embd|rope_freqs|rope_factors_(long|short))\.")
"""Tables of rotary embeddings, which the configuration gives."""


@dataclass(frozen=True, slots=True)
class ArrangedTensor:
    """A parameter that is one or several tensors of the file in another arrangement."""

    parts: tuple[DecodedTensor, ...]
    join: Join
    shape: tuple[int, ...]

    @classmethod
    def of(cls, parts: tuple[DecodedTensor, ...], join: Join) -> ArrangedTensor:
        """Raises CheckpointError for tensors whose shapes or types do not go together."""
        if len({part.dtype.is_floating_point for part in parts}) > 1:
            kinds = ", ".join(f"{part.key} of {part.tensor.type_name}" for part in parts)
            raise CheckpointError(f"{parts[0].tensor.file}: {kinds} do not fit each other; fetch the file again")
        try:
            shape = join(*[torch.empty(part.shape, device="meta") for part in parts]).shape
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            shapes = ", ".join(f"{part.key} {list(part.shape)}" for part in parts)
            raise CheckpointError(
                f"{parts[0].tensor.file}: {shapes} do not fit each other or the metadata ({error}); fetch the file"
                " again"
            ) from error
        return cls(parts, join, tuple(shape))

    @property
    def key(self) -> str:
        """The tensors' names."""
        return " + ".join(part.key for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """Of what `read` gives."""
        return self.parts[0].dtype

    @property
    def stored(self) -> tuple[GgufTensor, ...]:
        """The tensors of the file that it is made from."""
        return tuple(part.tensor for part in self.parts)

    @property
    def storage(self) -> Storage:
        """How its values lie there: of several tensors as the first."""
        return self.parts[0].storage

    def read(self) -> torch.Tensor:
        """The whole parameter."""
        return self.join(*[part.read() for part in self.parts])

    def read_slice(self, index: int) -> torch.Tensor:
        """[1, ...]: one expert's entry of a parameter of experts."""
        return self.join(*[part.read_slice(index) for part in self.parts])


@dataclass(frozen=True, slots=True)
class Numbers:
    """A parameter of int64 that stands in the metadata. key: its name there."""

    key: str
    values: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """One dimension."""
        return (len(self.values),)

    @property
    def dtype(self) -> torch.dtype:
        """Of what `read` gives."""
        return torch.int64

    @property
    def stored(self) -> tuple[GgufTensor, ...]:
        """No tensor of the file."""
        return ()

    @property
    def storage(self) -> Storage:
        """As llama.cpp calls such numbers."""
        return Storage("I64")

    def read(self) -> torch.Tensor:
        """The whole parameter."""
        return torch.tensor(self.values, dtype=torch.int64)

    def read_slice(self, index: int) -> torch.Tensor:
        """[1]: one of the numbers."""
        return self.read()[index : index + 1]


GgufSource = DecodedTensor | ArrangedTensor | Numbers


def sources_of(model: GgufModel, config: Mapping[str, Any]) -> dict[str, GgufSource]:
    """Every parameter of the model by its name in transformers, and tensors that it has no place for by one alike.

    config: as `config_of` gives it. Raises UnsupportedCheckpointError for an architecture that is not read.
    """
    config = config.get("text_config", config)
    fields = Fields(model)
    family = family_of(fields)
    places = (*family.places, *SHARED_PLACES)
    whole, layers = _by_layer(fields)
    found = _placed(whole, (*family.whole, *WHOLE_MODEL), "", config)
    found |= {target: Numbers(key, tuple(values)) for target, (key, values) in family.numbers(fields).items()}
    for number, tensors in layers.items():
        prefix = f"model.layers.{number}."
        if number < num_hidden_layers(fields):
            found |= _placed(tensors, places, prefix, config)
        else:
            found |= {prefix + name: DecodedTensor(tensor) for name, tensor in tensors.items()}
    if family.wrapper is None:
        return found
    return {INSIDE.sub(INSIDE_WRAPPER, name): source for name, source in found.items()}


def _by_layer(fields: Fields) -> tuple[dict[str, GgufTensor], dict[int, dict[str, GgufTensor]]]:
    whole: dict[str, GgufTensor] = {}
    layers: dict[int, dict[str, GgufTensor]] = defaultdict(dict)
    for name, tensor in fields.model.tensors.items():
        if UNUSED.match(name):
            continue
        layer = LAYER.match(name)
        if layer is None:
            whole[name] = tensor
        else:
            layers[int(layer[1])][layer[2]] = tensor
    if fields.given(NGRAM_LAYERS) and NGRAM_TABLE in whole:
        layers[ngram_layer(fields)][NGRAM_TABLE] = whole.pop(NGRAM_TABLE)
    return whole, dict(sorted(layers.items()))


def _placed(
    tensors: Mapping[str, GgufTensor], places: tuple[Place, ...], prefix: str, config: Mapping[str, Any]
) -> dict[str, GgufSource]:
    """The parameters of a layer; what is left over keeps its name in the file."""
    left, found = dict(tensors), dict[str, GgufSource]()
    for place in places:
        if all(part in left for part in place.parts):
            parts = tuple(DecodedTensor(left.pop(part)) for part in place.parts)
            as_it_is = place.how == "as it is"
            found[prefix + place.target] = (
                parts[0] if as_it_is else ArrangedTensor.of(parts, join_of(place.how, config))
            )
    return found | {prefix + name: DecodedTensor(tensor) for name, tensor in left.items()}
