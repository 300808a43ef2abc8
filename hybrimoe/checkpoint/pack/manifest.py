"""What a pack says of itself: hybrimoe-pack.json, in the folder that `hybrimoe convert` writes.

The folder holds the packed experts and packed dense layers in record files, as starts of any model keep them
(`record_file`), all other weights in model.safetensors by the names of the model's parameters, config.json, and the
tokenizer's files. Nothing in it names a path outside.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpu_kernels import LAYOUT_VERSION
from cpu_kernels.format.spec import DTYPES
from hybrimoe.checkpoint.errors import unreadable
from hybrimoe.checkpoint.source import MANIFEST_NAME, SINGLE_NAME
from hybrimoe.errors import CheckpointError
from hybrimoe.text_files import parse_json

FORMAT_VERSION = 1
LINEAR_ENTRIES = 5
MOST_SIZE = 1 << 40  # of rows, columns, experts and bytes of a record: their products stay far from 64 bits
PACKED_NAME = re.compile(r"[\w.-]+\.hybrimoe")
SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Manifest:
    """identity: what record files of the pack say they come from; a hash of the checkpoint and of how it was packed.

    made_from: what was converted, for people. expert_dtype, dense_dtype: as the deployment said. experts, dense: names
    of the record files, None where there is none. layers, linears: what lies in them, as in their headers.
    """

    identity: str
    made_from: str
    expert_dtype: str
    dense_dtype: str
    experts: str | None
    layers: list[dict[str, Any]]
    dense: str | None
    linears: list[list[Any]]
    format: int = FORMAT_VERSION
    layout: int = LAYOUT_VERSION

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that weights lie in."""
        return tuple(name for name in (self.experts, self.dense, SINGLE_NAME) if name is not None)


def read_manifest(folder: Path) -> Manifest | None:
    """What a folder says of itself as a pack; None where it is none.

    Raises CheckpointError for one that is damaged, or was written by another version of this program.
    """
    file = folder / MANIFEST_NAME
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(unreadable(file, error, "`hybrimoe convert` the model again")) from error
    versions = (found.get("format"), found.get("layout")) if isinstance(found, dict) else None
    if versions != (FORMAT_VERSION, LAYOUT_VERSION):
        raise CheckpointError(
            f"{folder} is a pack of another version of HybriMoE (format and layout {versions}; this one reads"
            f" {(FORMAT_VERSION, LAYOUT_VERSION)}); `hybrimoe convert` the model again"
        )
    try:
        manifest = Manifest(**found)
        _check(manifest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); `hybrimoe convert` the model again") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Raises ValueError for whatever is not what `convert` writes: sizes are multiplied, and names are opened."""
    for name in ("identity", "made_from", "expert_dtype", "dense_dtype"):
        _require(isinstance(value := getattr(manifest, name), str), name, value, "a text")
    _require(manifest.expert_dtype in DTYPES, "expert_dtype", manifest.expert_dtype, f"one of {', '.join(DTYPES)}")
    for name in ("experts", "dense"):
        file = getattr(manifest, name)
        _require(file is None or _is_name(file), name, file, "the name of a file in the folder")
    _require(isinstance(manifest.layers, list), "layers", manifest.layers, "a list")
    for layer in manifest.layers:
        sizes = (layer.get("num_experts"), layer.get("record_bytes")) if isinstance(layer, dict) else ()
        whole = bool(sizes) and all(map(_is_size, sizes)) and isinstance(layer.get("path"), str)
        _require(whole and layer.get("dtype") in DTYPES, "layers", layer, "path, dtype, num_experts and record_bytes")
    _require(isinstance(manifest.linears, list), "linears", manifest.linears, "a list")
    for linear in manifest.linears:
        whole = isinstance(linear, list) and len(linear) == LINEAR_ENTRIES and isinstance(linear[0], str)
        whole = whole and _is_size(linear[1]) and _is_size(linear[2]) and linear[3] in DTYPES
        _require(whole, "linears", linear, "path, rows, columns, dtype and the dtype before")


def _require(fits: bool, name: str, found: object, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, found {str(found)[:SHOWN_CHARACTERS]}")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= MOST_SIZE


def _is_name(value: object) -> bool:
    return isinstance(value, str) and PACKED_NAME.fullmatch(value) is not None
