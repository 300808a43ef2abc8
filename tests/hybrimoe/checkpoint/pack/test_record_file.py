"""What holds of both packed files, of experts and of dense layers: kept beside the model or in the cache, one a dtype,
never used when it is half or damaged, written by one or by several processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hybrimoe.checkpoint import PackedFileWarning, load, loading
from hybrimoe.checkpoint.pack import experts as packed
from hybrimoe.checkpoint.pack import record_file
from hybrimoe.checkpoint.safetensors_file import open_safetensors
from tests.forked import Forked

from ..models import DENSE_OPTIONS, OPTIONS, done_in_loading, files_of, logits


@dataclass(frozen=True)
class Kind:
    """One of the two files: its name and option, what is shown while it is packed, and scripts that write and read a
    small one at `place`."""

    what: str
    option: str
    packing: str
    setup: str
    write: str
    read: str


EXPERTS = Kind(
    "experts",
    "expert_dtype",
    "packing experts",
    """
import numpy as np
from cpu_kernels import ExpertSpec
from hybrimoe.checkpoint.pack import experts as packed
from hybrimoe.runtime.store import LayerSpec
layers = (LayerSpec("layer", ExpertSpec(64, 64, "float32"), 4),)
header = packed.describe(layers, ())
records = np.full(layers[0].nbytes, 7, dtype=np.uint8)
""",
    "packed.write(place, records, header)",
    "packed.find((place,), layers, header).open()",
)
DENSE = Kind(
    "dense",
    "dense_dtype",
    "packing dense layers",
    """
import torch
from cpu_kernels import LinearSpec
from hybrimoe.checkpoint.pack import dense as packed_dense
from hybrimoe.checkpoint.pack.dense import DenseSource
from hybrimoe.dense.records import DenseRecords, LinearEntry
source = DenseSource((LinearEntry("layer", LinearSpec(64, 64, "int8"), torch.bfloat16),), {})
header = packed_dense.describe(source, ())
records = DenseRecords(source.entries)
records.buffer[:] = 7
""",
    "packed_dense.write(place, source, records, header)",
    "packed_dense.read((place,), source, header, lambda *call: None)",
)
of_each_kind = pytest.mark.parametrize("kind", [EXPERTS, DENSE], ids=lambda kind: kind.what)
PLACE = """
import os, signal, sys
from pathlib import Path
from hybrimoe.checkpoint.pack import record_file
place = Path(sys.argv[1])
"""


def packed_in(done: set[str]) -> set[str]:
    return done & {EXPERTS.packing, DENSE.packing}


@of_each_kind
def test_each_dtype_has_a_file_and_the_other_kind_is_kept_once(kind: Kind, directory: Path) -> None:
    assert packed_in(done_in_loading(directory)) == {EXPERTS.packing, DENSE.packing}
    other = {"int8": "int4", "int4": "int8"}[DENSE_OPTIONS[kind.option]]
    assert packed_in(done_in_loading(directory, **{kind.option: other})) == {kind.packing}
    for dtype in ("int8", "int4"):
        assert not packed_in(done_in_loading(directory, **{kind.option: dtype}))
    (another,) = {"experts", "dense"} - {kind.what}
    assert len(files_of(another, directory)) == 1
    assert len(files_of(kind.what, directory)) == 2


def test_they_can_be_left_out(directory: Path) -> None:
    for _ in range(2):
        assert packed_in(done_in_loading(directory, packed_file=False)) == {EXPERTS.packing, DENSE.packing}
    assert not list(directory.rglob("*.hybrimoe"))


@of_each_kind
@pytest.mark.parametrize("damage", ["short", "long", "magic", "header", "empty"])
def test_a_half_or_damaged_file_is_not_used(damage: str, kind: Kind, directory: Path) -> None:
    expected = logits(load(directory, **DENSE_OPTIONS))
    (file,) = files_of(kind.what, directory)
    data = file.read_bytes()
    changed = {
        "short": data[:-64],
        "long": data + bytes(64),
        "magic": b"X" + data[1:],
        "header": data.replace(b'"format"', b'"forma!"'),
        "empty": b"",
    }
    file.write_bytes(changed[damage])
    assert torch.equal(logits(load(directory, **DENSE_OPTIONS)), expected)
    assert file.read_bytes() == data, "packed again"


def test_a_model_directory_that_cannot_be_written_uses_the_cache(
    directory: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = record_file.whole_or_nothing

    def read_only(path: Path, header: dict[str, Any], n_bytes: int) -> Any:
        if path.parent == directory:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, header, n_bytes)

    monkeypatch.setattr(record_file, "whole_or_nothing", read_only)
    done_in_loading(directory)
    assert not list(directory.rglob("*.hybrimoe"))
    assert [len(files_of(what, own_cache)) for what in ("experts", "dense")] == [1, 1]
    assert done_in_loading(directory) == {"reading packed dense layers"}, "experts are mapped"


def test_no_place_at_all_is_a_warning_and_the_model_runs(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path / "file" / "cache"))
    places = (tmp_path / "file" / "beside", tmp_path / "file" / "cache")
    monkeypatch.setattr(loading, "folders", lambda directory, *, beside: places)
    with pytest.warns(PackedFileWarning, match=r"could not be kept.*Not a directory.*HYBRIMOE_CACHE"):
        model = load(directory, **OPTIONS)
    assert logits(model).isfinite().all()


def test_a_full_disk_is_a_warning_each_and_leaves_nothing_behind(
    directory: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(PackedFileWarning, match="No space left on device") as caught:
        model = load(directory, **DENSE_OPTIONS)
    said = [str(warning.message) for warning in caught]
    assert [("packed dense layers" in text, "packed experts" in text) for text in said] == [
        (True, False),
        (False, True),
    ]
    assert logits(model).isfinite().all()
    left = [file for place in (directory, own_cache) for file in place.rglob("*")]
    assert not [file for file in left if file.name.startswith(("experts-", "dense-"))]


@of_each_kind
def test_a_kill_while_writing_leaves_a_half_file_that_is_swept_away(kind: Kind, directory: Path) -> None:
    stop = "record_file._sync_folder = os.fsync = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
    with Forked(PLACE + kind.setup + stop + kind.write, str(directory)) as killed:
        _, errors = killed.communicate()
        assert killed.returncode == -signal.SIGKILL, errors
    assert files_of(kind.what, directory) == []
    assert len(list(directory.glob("*.partial"))) == 1
    assert kind.packing in done_in_loading(directory)
    assert len(files_of(kind.what, directory)) == 1
    assert list(directory.glob("*.partial")) == []


def test_a_partial_file_that_is_being_written_is_left_alone(directory: Path) -> None:
    layers = load(directory, **DENSE_OPTIONS, packed_file=False).hybrimoe.session.layer_specs()
    header = packed.describe(layers, ())
    with record_file.whole_or_nothing(directory / packed.file_name(header), header, 64):
        assert EXPERTS.packing in done_in_loading(directory)
        assert len(list(directory.glob("*.partial"))) == 1
    assert list(directory.glob("*.partial")) == []


def test_a_partial_file_that_is_swept_away_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkstemp, []

    def make_and_sweep(**options: Any) -> tuple[int, str]:
        made.append(make(**options))
        if len(made) < 3:
            record_file._sweep(tmp_path)  # as another process would, that begins to write just now
        return made[-1]

    monkeypatch.setattr(tempfile, "mkstemp", make_and_sweep)
    record_file.write(tmp_path / "records", np.full(64, 7, np.uint8), {})
    assert len(made) == 3
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["records"]


@of_each_kind
def test_two_processes_write_and_read_at_once(kind: Kind, tmp_path: Path) -> None:
    """Each writes and reads back many times; what it finds is always whole."""
    script = f"for _ in range(15):\n    {kind.write}\n    assert ({kind.read}.buffer == 7).all()\n"
    program = PLACE + kind.setup + script
    with Forked(program, str(tmp_path / "model")) as one, Forked(program, str(tmp_path / "model")) as two:
        errors = [process.communicate()[1] for process in (one, two)]
        assert (one.returncode, two.returncode) == (0, 0), errors
    assert len(files_of(kind.what, tmp_path)) == 1
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_system_without_posix_calls_writes_and_reads_too(tmp_path: Path) -> None:
    """As on Windows: no fcntl, no positioned reads and writes, no modes of descriptors, no folders to open."""
    hidden = """
import os, sys
sys.modules["fcntl"] = None
for name in ("pread", "preadv", "pwrite", "pwritev", "fchmod", "posix_fallocate"):
    delattr(os, name)
"""
    script = f"""
import torch
from safetensors.torch import save_file
from hybrimoe.checkpoint.safetensors_file import open_safetensors
record_file._sync_folder = lambda folder: None
place.mkdir()
(place / "left.partial").touch()
{EXPERTS.setup}
{EXPERTS.write}
assert ({EXPERTS.read}.buffer == 7).all()
assert (packed.find((place,), layers, header).read(pinned=False).buffer == 7).all()
{DENSE.setup}
{DENSE.write}
assert ({DENSE.read}.buffer == 7).all()
save_file({{"w": torch.arange(6.0).reshape(2, 3)}}, place / "w.safetensors")
assert open_safetensors(place / "w.safetensors").tensors["w"].read_slice(1).tolist() == [[3.0, 4.0, 5.0]]
"""
    words = [sys.executable, "-c", hidden + PLACE + script, str(tmp_path / "model")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.partial"))


def test_a_change_between_the_samples_of_a_file_is_seen_in_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.zeros(1 << 20) for name in ("a", "b", "y", "z")} | {"q_proj.weight": torch.zeros(64, 64)}
    save_file(tensors, path)
    before, keys = path.stat(), {"q_proj.weight"}
    blind, seeing = (record_file.stamps([open_safetensors(path)], chosen) for chosen in ((), keys))
    tensors["q_proj.weight"] += 1
    save_file(tensors, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert record_file.stamps([open_safetensors(path)]) == blind, "64 samples of 16 MiB miss 16 KiB"
    assert record_file.stamps([open_safetensors(path)], keys) != seeing
