"""A file with the keys and values of a text: safetensors with the tokens, the identity of the model, and a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import FileError
from hybrimoe.generation.saved.conversation_file import write_whole

if TYPE_CHECKING:
    import torch

__all__ = ["DamagedStatesError", "OtherModelError", "SavedStates", "has_states", "read_states", "write_states"]

TOKENS = "token_ids"


class DamagedStatesError(FileError):
    """A file that is not what was written."""


class OtherModelError(FileError):
    """States of another model, template or configuration."""


@dataclass(frozen=True, slots=True)
class SavedStates:
    """`held`: of each layer, keys and values [1, heads, tokens, row], of the tokens `token_ids`."""

    token_ids: list[int]
    held: list[tuple[torch.Tensor, torch.Tensor]]


def write_states(
    path: Path, token_ids: Sequence[int], held: Sequence[tuple[Any, Any]], identity: str, model: str = ""
) -> int:  # fmt: skip
    """Write them, whole or not at all, readable by their user alone; returns the bytes of the file.

    identity: of all that they depend on; model: what an error calls it. Raises OSError where that cannot be.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {TOKENS: torch.tensor(list(token_ids), dtype=torch.long)}
    for index, (keys, values) in enumerate(held):
        tensors |= {f"keys.{index}": keys.cpu().contiguous(), f"values.{index}": values.cpu().contiguous()}
    metadata = {"identity": identity, "model": model, "sha256": _checksum(tensors)}

    def write(partial: Path) -> None:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # its words for a full disk
            raise OSError(0, str(error)) from error

    write_whole(path, write)
    return path.stat().st_size


def read_states(path: Path, identity: str) -> SavedStates:
    """What `write_states` wrote for a model with this identity.

    Raises FileNotFoundError, DamagedStatesError, and OtherModelError with the name of the model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "identity" in metadata and metadata["identity"] != identity:
                raise OtherModelError(metadata.get("model") or "")
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedStatesError(str(error)) from error
    if metadata.get("identity") != identity or TOKENS not in tensors:
        raise DamagedStatesError("they do not say what they are of")
    if metadata.get("sha256") != _checksum(tensors):
        raise DamagedStatesError("their checksum is another")
    token_ids = tensors.pop(TOKENS).tolist()
    held = [(tensors[f"keys.{index}"], tensors[f"values.{index}"]) for index in range(len(tensors) // 2)]
    return SavedStates(token_ids, held)


def has_states(path: Path) -> bool:
    """Whether a file is one that `write_states` wrote, undamaged as far as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return "identity" in (file.metadata() or {})
    except (OSError, ValueError, SafetensorError):
        return False


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, shapes, dtypes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
