"""Metadata of a GGUF file under its architecture's prefix, each value checked when it is asked for."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.gguf.file import GgufModel
from hybrimoe.errors import CheckpointError

ARCHITECTURE_KEY = "general.architecture"
END_KEYS = ("eos", "eot", "eom")
MAX_VALUES_BYTES = 1 << 16  # of a table: more than any head has
FLOAT32_BYTES = 4
PREDICTION_UNCOUNTED = ("deepseek4",)
"""Architectures whose first files name layers that predict several tokens, and neither have nor count them."""
PREDICTS = "nextn.eh_proj.weight"
MAX_WHOLE = 1 << 31  # no size or count of a model is more


@dataclass(frozen=True, slots=True)
class Fields:
    """The metadata and tensors of a model as its family asks for them. Names are without the architecture's prefix."""

    model: GgufModel
    architecture: str = field(init=False)

    def __post_init__(self) -> None:
        name = self.model.metadata.get(ARCHITECTURE_KEY)
        if not isinstance(name, str):
            raise CheckpointError(f"{self.model.path} does not say what it is: it has no {ARCHITECTURE_KEY}")
        object.__setattr__(self, "architecture", name)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """All of it, under its own keys."""
        return self.model.metadata

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A size or number. Raises CheckpointError where it is missing without a `default`, or none."""
        value = self._same_in_all_layers(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < MAX_WHOLE:
            raise self.wrong(name, value, f"a whole number of {least} or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number as the shortest decimal that its float32 stands for: 1e-06, not 9.99999997e-07."""
        value = self._same_in_all_layers(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value - value != 0:
            raise self.wrong(name, value, "a number")
        return _shortest(float(value))

    def n_layers(self) -> int:
        """How many the model has, without those that predict several tokens. Errors as `whole`."""
        layers, predicting = self.whole("block_count"), self.whole("nextn_predict_layers", 0, least=0)
        if self.architecture in PREDICTION_UNCOUNTED and not self.has(f"blk.{layers - predicting}.{PREDICTS}"):
            return layers
        return layers - predicting

    def each(self, name: str, default: Any) -> Any:
        """A value as the file has it: of all layers, or a list with one of each."""
        return self._value(name, default)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """A truth value."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A word."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "a text")
        return value

    def token(self, key: str) -> int | None:
        """The id of a special token of the vocabulary; None where the file has none that is in it."""
        value = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if isinstance(value, int) and 0 <= value < self.shape("token_embd.weight")[0] else None

    def end_tokens(self) -> list[int]:
        """Ids of the tokens that a reply may end in."""
        return list(dict.fromkeys(end for key in END_KEYS if (end := self.token(key)) is not None))

    def given(self, name: str) -> bool:
        """Whether the file has this value."""
        return self._key(name) in self.metadata

    def has(self, *tensors: str) -> bool:
        """Whether the file has one of these tensors."""
        return not self.model.tensors.keys().isdisjoint(tensors)

    def shape(self, *tensors: str) -> tuple[int, ...]:
        """Of the first of these tensors that is there. Raises CheckpointError where none is."""
        found = next((self.model.tensors[name] for name in tensors if name in self.model.tensors), None)
        if found is None:
            raise CheckpointError(f"{self.model.path} lacks the tensor {' or '.join(tensors)}")
        return found.shape

    def values(self, tensor: str) -> list[float]:
        """A small float32 tensor. Raises CheckpointError where it is missing, of another type, or none."""
        found = self.model.tensors.get(tensor)
        if found is None or found.kind.name != "F32" or not 0 < found.nbytes <= MAX_VALUES_BYTES:
            is_now = "missing" if found is None else f"{found.type_name} {list(found.shape)}"
            raise CheckpointError(
                f"{self.model.path}: {tensor} is {is_now}; expected some float32 values. Fetch the file again"
            )
        with found.file.open("rb") as stream:
            stream.seek(found.offset_bytes)
            values = [value for (value,) in struct.iter_unpack("<f", stream.read(found.nbytes))]
        if len(values) * FLOAT32_BYTES != found.nbytes or not all(value > 0 for value in values):
            raise CheckpointError(f"{self.model.path}: the values of {tensor} are none; fetch the file again")
        return values

    def wholes(self, name: str, count: int, most: int, least: int = 0) -> list[int]:
        """A list of `count` numbers or more, of which the first `count`. Raises CheckpointError for anything else."""
        value = self._value(name, None)
        numbers = value[:count] if isinstance(value, list) else []
        whole = all(isinstance(n, int) and not isinstance(n, bool) and least <= n <= most for n in numbers)
        if len(numbers) < count or not whole:
            raise self.wrong(name, value, f"{count} whole numbers from {least} to {most}")
        return numbers

    def each_whole(self, name: str, layers: int, default: int | None = None, least: int = 0) -> list[int]:
        """A size or number of each layer, where the file has one for all or a list."""
        value = self._value(name, default)
        found = value[:layers] if isinstance(value, list) else [value] * layers
        if len(found) < layers or not all(isinstance(n, int) and least <= n < MAX_WHOLE for n in found):
            raise self.wrong(name, value, f"a whole number of {least} or more for each of {layers} layers")
        return [int(n) for n in found]

    def wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        """The error for a value that is missing or not what it should be."""
        found = "missing" if value is None else f"{str(value)[:60]!r}"
        return CheckpointError(
            f"{self.model.path}: {self._key(name)} is {found}; expected {expected}. The file is damaged, or no"
            f" conversion of a {self.architecture} model; fetch it again"
        )

    def most_whole(self, name: str, default: int) -> int:
        """A size or number that is 0 in layers which have no such thing, and the same in all others."""
        value = self._value(name, default)
        if not isinstance(value, list):
            return self.whole(name, default)
        others = {n for n in value if n != 0 or isinstance(n, bool)}
        if len(others) != 1 or not isinstance(found := others.pop(), int) or not 0 < found < MAX_WHOLE:
            raise self.wrong(name, value, "one number, and 0 for layers without attention")
        return found

    def _value(self, name: str, default: Any) -> Any:
        return self.metadata.get(self._key(name), default)

    def _same_in_all_layers(self, name: str, default: Any) -> Any:
        value = self._value(name, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) > 1:
            raise UnsupportedCheckpointError(
                f"{self.model.path}: {self._key(name)} differs from layer to layer ({str(value)[:60]}), which is not"
                f" read for {self.architecture}"
            )
        return value[0] if value else None

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"


def _shortest(value: float) -> float:
    """The decimal of fewest digits with the same float32."""
    try:
        single = struct.pack("<f", value)
    except OverflowError:
        return value
    if struct.unpack("<f", single)[0] != value:
        return value  # a float64, such as a default
    return next(short for digits in range(1, 10) if struct.pack("<f", short := float(f"{value:.{digits}g}")) == single)
