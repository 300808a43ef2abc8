"""The packed file: mapped at the second start, never used when it is half, stale or another model's."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from gpu_kernels.emulated import EmulatedAccelerator
from hybrimoe.checkpoint import PackedFileWarning, load, loading, packed, record_file
from hybrimoe.errors import BudgetError, CheckpointError
from hybrimoe.runtime.store import ExpertStore

TOKENS = torch.arange(3, 15)[None]
OPTIONS: dict[str, Any] = {"policy": "static", "accelerator": "none", "expert_dtype": "bfloat16", "progress": False}
WRITE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from cpu_kernels import ExpertSpec
from hybrimoe.checkpoint import packed, record_file
from hybrimoe.runtime.store import LayerSpec
layers = (LayerSpec("layer", ExpertSpec(64, 64, "float32"), 4),)
header = packed.describe(layers, ())
records = np.full(layers[0].nbytes, 7, dtype=np.uint8)
place = Path(sys.argv[1])
"""


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def packed_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.hybrimoe"))


def packing(directory: Path, **options: Any) -> bool:
    """Loads; True if experts were packed, False if a packed file was mapped."""
    calls: list[str] = []
    load(directory, **OPTIONS | {"progress": lambda *call: calls.append(call[2])} | options)
    return "packing experts" in calls


def test_the_second_start_maps_what_the_first_one_packed(directory: Path) -> None:
    first = load(directory, **OPTIONS)
    (file,) = packed_files(directory)
    written = file.stat().st_mtime_ns
    second = load(directory, **OPTIONS)
    store = second.hybrimoe.session.store
    assert isinstance(store.buffer.base, np.memmap) or isinstance(store.buffer, np.memmap)
    assert not store.buffer.flags.writeable
    assert np.array_equal(store.buffer, first.hybrimoe.session.store.buffer)
    assert torch.equal(logits(first), logits(second))
    assert file.stat().st_mtime_ns == written
    assert not list(directory.glob("*.partial"))


def test_an_accelerator_that_wants_pinned_memory_gets_it_at_the_second_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read in pieces; page-locked memory itself needs a GPU's driver, so here it is ordinary."""
    emulated = OPTIONS | {"accelerator": "emulated"}
    first = load(directory, **emulated)
    calls: list[tuple[int, int]] = []

    def note(done: int, total: int, what: str) -> None:
        if what == "reading packed experts":
            calls.append((done, total))

    monkeypatch.setattr(record_file, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(EmulatedAccelerator, "needs_pinned_host", lambda self: True)
    monkeypatch.setattr(packed, "ExpertStore", lambda layers, pinned: ExpertStore(layers) if pinned else None)
    store = load(directory, **emulated | {"progress": note}).hybrimoe.session.store
    assert store.buffer.flags.writeable
    assert np.array_equal(store.buffer, first.hybrimoe.session.store.buffer)
    assert calls == [(min(done, store.nbytes), store.nbytes) for done in range(1000, store.nbytes + 1000, 1000)]
    with pytest.raises(BudgetError, match=r"memory\.host allows"):
        load(directory, **emulated, memory={"host": "1KiB"})
    monkeypatch.undo()
    assert not load(directory, **emulated, memory={"disk": "auto"}).hybrimoe.session.store.buffer.flags.writeable


def test_a_file_that_is_cut_while_it_is_read(directory: Path) -> None:
    layers = load(directory, **OPTIONS).hybrimoe.session.layer_specs()
    (path,) = packed_files(directory)
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(CheckpointError, match="cut short"):
        packed.PackedFile(path, layers, record_file.PAGE_BYTES).read(pinned=False)


def test_each_dtype_has_a_file_of_its_own(directory: Path) -> None:
    assert packing(directory)
    assert packing(directory, expert_dtype="int4")
    assert len(packed_files(directory)) == 2
    assert not packing(directory)
    assert not packing(directory, expert_dtype="int4")


def test_it_can_be_left_out(directory: Path) -> None:
    assert packing(directory, packed_file=False)
    assert packed_files(directory) == []


def test_a_changed_checkpoint_is_packed_again(directory: Path) -> None:
    before = logits(load(directory, **OPTIONS))
    tensors = load_file(directory / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key] = 2 * tensors[key]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert not torch.allclose(before, logits(load(directory, **OPTIONS)))
    assert not packing(directory)


@pytest.mark.parametrize("damage", ["short", "long", "magic", "header", "empty"])
def test_a_half_or_damaged_file_is_not_used(damage: str, directory: Path) -> None:
    expected = logits(load(directory, **OPTIONS))
    (file,) = packed_files(directory)
    data = file.read_bytes()
    changed = {
        "short": data[:-64],
        "long": data + bytes(64),
        "magic": b"X" + data[1:],
        "header": data.replace(b'"format"', b'"forma!"'),
        "empty": b"",
    }
    file.write_bytes(changed[damage])
    assert torch.equal(logits(load(directory, **OPTIONS)), expected)
    assert file.read_bytes() == data, "packed again"


def test_another_record_layout_is_packed_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packing(directory)
    monkeypatch.setattr(packed, "LAYOUT_VERSION", packed.LAYOUT_VERSION + 1)
    assert packing(directory)


def test_a_model_directory_that_cannot_be_written_uses_the_cache(
    directory: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = record_file.whole_or_nothing

    def read_only(path: Path, header: dict[str, Any], n_bytes: int) -> Any:
        if path.parent == directory:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, header, n_bytes)

    monkeypatch.setattr(record_file, "whole_or_nothing", read_only)
    assert packing(directory)
    assert packed_files(directory) == []
    assert len(packed_files(own_cache)) == 1
    assert not packing(directory)


def test_no_place_at_all_is_a_warning_and_the_model_runs(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(loading, "folders", lambda directory, *, beside: packed_places(tmp_path))
    with pytest.warns(PackedFileWarning, match="could not be kept.*Not a directory.*HYBRIMOE_CACHE"):
        model = load(directory, **OPTIONS)
    assert logits(model).isfinite().all()


def packed_places(tmp_path: Path) -> tuple[Path, ...]:
    return (tmp_path / "file" / "beside", tmp_path / "file" / "cache")


def test_a_full_disk_leaves_nothing_behind(directory: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(PackedFileWarning, match="No space left on device"):
        model = load(directory, **OPTIONS)
    assert logits(model).isfinite().all()
    assert not [file for place in (directory, own_cache) for file in place.rglob("*") if "experts" in file.name]


def run(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITE + script, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def test_a_kill_during_packing_leaves_a_half_file_that_is_swept_away(directory: Path) -> None:
    stop = "record_file._sync_folder = os.fsync = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
    killed = run(stop + "packed.write(place, records, header)", directory)
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert packed_files(directory) == []
    assert len(list(directory.glob("*.partial"))) == 1
    assert packing(directory)
    assert len(packed_files(directory)) == 1
    assert list(directory.glob("*.partial")) == []


def test_a_partial_file_that_is_being_written_is_left_alone(directory: Path) -> None:
    layers = load(directory, **OPTIONS, packed_file=False).hybrimoe.session.layer_specs()
    header = packed.describe(layers, ())
    with record_file.whole_or_nothing(directory / packed.file_name(header), header, 64):
        assert packing(directory)
        assert len(list(directory.glob("*.partial"))) == 1
    assert list(directory.glob("*.partial")) == []


def test_two_processes_pack_the_same_model_at_once(tmp_path: Path) -> None:
    """Each writes and reads back many times; what it finds is always whole."""
    script = """
for _ in range(15):
    packed.write(place, records, header)
    store = packed.find((place,), layers, header).open()
    assert (store.buffer == 7).all()
"""
    processes = [run(script, tmp_path / "model") for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len(packed_files(tmp_path)) == 1
    assert list(tmp_path.rglob("*.partial")) == []


def test_the_disk_tier_packs_straight_into_the_file(directory: Path) -> None:
    expected = load(directory, **OPTIONS, packed_file=False)
    model = load(directory, **OPTIONS, memory={"disk": "auto", "host": "1KiB"})
    store = model.hybrimoe.session.store
    assert not store.buffer.flags.writeable
    assert np.array_equal(store.buffer, expected.hybrimoe.session.store.buffer)
    assert torch.equal(logits(model), logits(expected))


def test_the_disk_tier_without_a_place_is_an_error(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"memory\.disk: the packed experts need.*packed_file=False"):
        load(directory, **OPTIONS, memory={"disk": "auto"}, packed_file=False)


def test_a_disk_tier_that_is_too_small(directory: Path) -> None:
    with pytest.raises(BudgetError, match=r"memory\.disk allows"):
        load(directory, **OPTIONS, memory={"disk": "1KiB"})
    assert packed_files(directory) == []


def test_a_moved_model_is_found_again_or_packed_again(directory: Path, tmp_path: Path) -> None:
    assert packing(directory)
    shutil.copytree(directory, tmp_path / "copy")
    assert not packing(tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", (time.time(), time.time() + 5))
    assert packing(tmp_path / "copy")


def test_other_weights_of_the_same_name_size_and_time_are_packed_again(directory: Path) -> None:
    assert packing(directory)
    file = directory / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    save_file({key: 2 * value for key, value in tensors.items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert packing(directory)


def test_a_system_without_posix_calls_packs_and_reads_too(tmp_path: Path) -> None:
    """As on Windows: no fcntl, no positioned reads and writes, no modes of descriptors, no folders to open."""
    hidden = """
import os, sys
sys.modules["fcntl"] = None
for name in ("pread", "preadv", "pwrite", "pwritev", "fchmod", "posix_fallocate"):
    delattr(os, name)
"""
    script = """
record_file._sync_folder = lambda folder: None
(place / "left.partial").parent.mkdir(exist_ok=True)
(place / "left.partial").touch()
packed.write(place, records, header)
found = packed.find((place,), layers, header)
assert (found.open().buffer == 7).all() and (found.read(pinned=False).buffer == 7).all()
import torch
from safetensors.torch import save_file
from hybrimoe.checkpoint.safetensors_file import open_safetensors
save_file({"w": torch.arange(6.0).reshape(2, 3)}, place / "w.safetensors")
assert open_safetensors(place / "w.safetensors").tensors["w"].read_slice(1).tolist() == [[3.0, 4.0, 5.0]]
"""
    command = [sys.executable, "-c", hidden + WRITE + script, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.partial"))
