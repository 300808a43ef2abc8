"""Positioned reads of weight files, into memory of their own: nothing is mapped, so resident memory is what is asked
for, and a file that is cut short while it is read ends in a CheckpointError (a mapping would end in SIGBUS)."""

from __future__ import annotations

from pathlib import Path

import torch

from hybrimoe.errors import CheckpointError


def read_bytes(path: Path, key: str, offset_bytes: int, n_bytes: int) -> torch.Tensor:
    """uint8 [n_bytes] of the file from `offset_bytes` on. key: the tensor that errors name.

    Raises CheckpointError where the file cannot be read or ends before that.
    """
    raw = torch.empty(n_bytes, dtype=torch.uint8)
    view = memoryview(raw.numpy().data)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset_bytes)
            while view:
                count = file.readinto(view) or 0
                if not count:
                    raise CheckpointError(f"{path} ends inside {key}: the file is truncated; fetch it again")
                view = view[count:]
    except OSError as error:
        raise CheckpointError(f"cannot read {key} from {path}: {error.strerror}") from error
    return raw
