"""The adapter_model.safetensors of an adapter: its tensors by the module that they adapt; headers are read only."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

from hybrimoe.checkpoint.adapters.settings import MERGE_FIRST, WEIGHTS_NAME, Settings, read_settings
from hybrimoe.checkpoint.errors import UnsupportedCheckpointError, listed
from hybrimoe.checkpoint.safetensors_file import SafetensorsFile, StoredTensor, open_safetensors
from hybrimoe.config.adapters import parse_adapter
from hybrimoe.errors import CheckpointError

PREFIX = "base_model.model."
PART = re.compile(
    r"^(?P<module>.+?)(?P<wrappers>(?:\.base_layer)*)"
    r"\.(?P<part>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
WRAPPER_NAMES = re.compile(r"\.(base_layer|modules_to_save|original_module|default)(?=\.)")


@dataclass(frozen=True, slots=True)
class Factors:
    """The matrices of one adapted module or parameter: a [r, in] and b [out, r].

    module: its path, as the file has it. depth: how many wrappers stand around it; PEFT puts one around another where
    it adapts several parameters of a module. magnitude: [out], of DoRA. of_embedding: b a is the change transposed.
    """

    module: str
    depth: int
    a: StoredTensor
    b: StoredTensor
    magnitude: StoredTensor | None
    of_embedding: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter. full: weights that take the place of the model's own, by the path of the parameter. identity:
    a hash of all weights and of what counts for merging them."""

    settings: Settings
    file: SafetensorsFile
    factors: tuple[Factors, ...]
    full: dict[str, StoredTensor]
    identity: str

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that its configuration gives, ascending."""
        return tuple(sorted({self.settings.rank, *self.settings.rank_pattern.values()}))


def open_adapter(name: str) -> Adapter:
    """Opens an adapter, `DIR` or `DIR:SCALE`, and checks its headers.

    Raises what `read_settings` raises, CheckpointError for a file that is cut short or damaged, and
    UnsupportedCheckpointError for weights that belong to no LoRA.
    """
    settings = read_settings(parse_adapter(name))
    file = open_safetensors(settings.folder / WEIGHTS_NAME)
    parts: dict[tuple[str, int], dict[str, StoredTensor]] = {}
    full: dict[str, StoredTensor] = {}
    for key, tensor in file.tensors.items():
        path = key.removeprefix(PREFIX)
        found = PART.match(path)
        if found is not None:
            depth = found["wrappers"].count(".base_layer")
            parts.setdefault((found["module"], depth), {})[found["part"]] = tensor
        elif "lora_" in path or "token_adapter" in path:
            raise UnsupportedCheckpointError(f"{file.path}: {key} is no part of LoRA as it is merged; {MERGE_FIRST}")
        else:
            full[WRAPPER_NAMES.sub("", path)] = tensor
    if not parts and not full:
        raise CheckpointError(f"{file.path} has no weights; save the adapter again")
    factors = tuple(_factors(file, module, depth, found) for (module, depth), found in parts.items())
    if full and settings.scale != 1.0:
        raise CheckpointError(
            f"{settings.folder}: a scale of {settings.scale:g} was given, and the adapter replaces"
            f" {listed(sorted(full))} whole (modules_to_save), which cannot be scaled; give it without a scale"
        )
    return Adapter(settings, file, factors, full, _identity(settings, file))


def _factors(file: SafetensorsFile, module: str, depth: int, parts: dict[str, StoredTensor]) -> Factors:
    of_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A", "lora_B")
    if missing := [name for name in names if name not in parts]:
        raise CheckpointError(f"{file.path}: {module} lacks {' and '.join(missing)}; save the adapter again")
    a, b = (parts[name] for name in names)
    magnitude = parts.get("lora_magnitude_vector")
    for tensor, n_dims in ((a, 2), (b, 2), (magnitude, 1)):
        if tensor is not None and (
            len(tensor.shape) != n_dims or 0 in tensor.shape or not tensor.dtype.is_floating_point
        ):
            raise CheckpointError(
                f"{file.path}: {tensor.key} is {tensor.type_name} {list(tensor.shape)}, expected {n_dims} dimensions of"
                " floating point; the adapter was saved in parts (sharded training): gather it and save it again"
            )
    return Factors(module, depth, a, b, magnitude, of_embedding)


def _identity(settings: Settings, file: SafetensorsFile) -> str:
    known = {name: value for name, value in asdict(settings).items() if name not in ("folder", "base_model")}
    try:
        with file.path.open("rb") as stream:
            contents = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {file.path}: {error.strerror}") from error
    return hashlib.sha256(json.dumps([known, contents], sort_keys=True).encode()).hexdigest()
