"""Our own reader of safetensors files: what it reads, what it refuses, and where `safetensors.safe_open` gives up."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.safetensors_file import DTYPES, StoredTensor, open_safetensors
from hybrimoe.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = bytes(8), size_bytes: int | None = None) -> Path:
    """A file with this header (JSON, or text as it is); `size_bytes`: of the data, zeros that take no disk."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
        if size_bytes is not None:
            file.truncate(8 + len(text) + size_bytes)
    return path


def stored(path: Path, tensor: torch.Tensor) -> StoredTensor:
    save_file({"w": tensor}, path)
    return open_safetensors(path).tensors["w"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_and_a_slice_of_it(dtype: torch.dtype, tmp_path: Path) -> None:
    written = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    tensor = stored(tmp_path / "w.safetensors", written)
    assert tensor.read().dtype == tensor.read_slice(1).dtype == dtype
    assert torch.equal(tensor.read().view(torch.uint8), written.view(torch.uint8))
    assert torch.equal(tensor.read_slice(1).view(torch.uint8), written[1:].view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (0, 4)], ids=["scalar", "empty"])
def test_shapes_without_a_row(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = stored(tmp_path / "w.safetensors", torch.ones(shape))
    assert torch.equal(tensor.read(), torch.ones(shape))


@pytest.mark.parametrize("index", [-1, 2])
def test_a_slice_that_is_not_there(index: int, tmp_path: Path) -> None:
    tensor = stored(tmp_path / "w.safetensors", torch.ones(2, 3))
    with pytest.raises(CheckpointError, match=f"w has 2 entries, entry {index} was asked for"):
        tensor.read_slice(index)


def test_a_file_larger_than_memory_is_read(tmp_path: Path) -> None:
    """A mapping of it would be refused."""
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    n = 2 * memory
    entries = {"large": _entry("U8", [n], 0, n), "small": _entry("U8", [4], n, n + 4)}
    try:
        path = write(tmp_path / "w.safetensors", entries, b"", size_bytes=n + 4)
    except OSError:
        pytest.skip("this file system has no files of that size")
    assert open_safetensors(path).tensors["small"].read().tolist() == [0, 0, 0, 0]


def test_a_file_that_is_cut_or_removed_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensor = stored(path, torch.ones(1000))
    os.truncate(path, 500)
    with pytest.raises(CheckpointError, match="ends inside w: the file is truncated; fetch it again"):
        tensor.read()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read w from .*: No such file"):
        tensor.read()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*: No such file"):
        open_safetensors(tmp_path / "w.safetensors")


def _entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"no JSON", "its header is no JSON;"),
        (b"[" * 100_000, "its header is no JSON;"),
        ([1], "its header is no JSON object;"),
        ({"w": 1}, "entry for w is damaged"),
        ({"w": {"dtype": "F32"}}, "entry for w is damaged"),
        ({"w": _entry("F32", None, 0, 8)}, "entry for w is damaged"),
        ({"w": _entry("F32", ["2"], 0, 8)}, "entry for w is damaged"),
        ({"w": _entry("F32", [-1, -2], 0, 8)}, "entry for w is damaged"),
        ({"w": _entry("F32", [2], "0", 8)}, "entry for w is damaged"),
        ({"w": _entry("F32", [2], -8, 0)}, "entry for w is damaged"),
        ({"w": _entry("F32", [3], 0, 8)}, r"w F32\[3\] needs 12 bytes, the header gives 8"),
        ({"w": _entry("F32", [4], 0, 16)}, "its header promises"),
        ({"v": _entry("F32", [2], 0, 8), "w": _entry("F32", [2], 0, 8)}, "w overlaps v"),
        ({"v": _entry("F32", [2], 0, 8), "w": _entry("F16", [2], 4, 8)}, "w overlaps v"),
        ({"w": _entry("F32", [1], 4, 8)}, "w leaves a gap behind its header"),
        ({"v": _entry("U8", [2], 0, 2), "w": _entry("F32", [1], 4, 8)}, "w leaves a gap behind v"),
        ({"w": _entry("F32", [1], 0, 4)}, r"it has \d+ bytes, and its tensors end at \d+; fetch it again"),
    ],
)
def test_a_damaged_header(header: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_safetensors(write(tmp_path / "w.safetensors", header))


@pytest.mark.parametrize("dtype", ["F4", ["F32"]])
def test_a_dtype_that_is_not_read(dtype: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", {"w": _entry(dtype, [2], 0, 8)})
    with pytest.raises(UnsupportedCheckpointError, match=r"w has dtype .*; readable are F64"):
        open_safetensors(path)
