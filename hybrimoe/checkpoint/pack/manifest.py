"""What a pack says of itself: hybrimoe-pack.json, in the folder that `hybrimoe convert` writes.

The folder holds the packed experts and packed dense layers in record files, as starts of any model keep them
(`record_file`), all other weights in model.safetensors by the names of the model's parameters, config.json, and the
tokenizer's files. Nothing in it names a path outside.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpu_kernels import LAYOUT_VERSION
from hybrimoe.checkpoint.errors import unreadable
from hybrimoe.checkpoint.source import MANIFEST_NAME, SINGLE_NAME
from hybrimoe.errors import CheckpointError

FORMAT_VERSION = 1


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
        found = json.loads(file.read_text(encoding="utf-8"))
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
        return Manifest(**found)
    except TypeError as error:
        raise CheckpointError(f"{file} is damaged ({error}); `hybrimoe convert` the model again") from error
