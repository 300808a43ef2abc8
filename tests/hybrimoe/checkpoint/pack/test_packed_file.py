"""Packed experts: mapped or read at the second start, packed anew when the checkpoint is another one, the disk tier."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpu_kernels.host.mapped import is_watching
from gpu_kernels.emulated import EmulatedAccelerator
from hybrimoe.checkpoint import load
from hybrimoe.checkpoint.pack import experts as packed
from hybrimoe.checkpoint.pack import record_file
from hybrimoe.errors import BudgetError, CheckpointError
from hybrimoe.generation import PrefixCache, TextGenerator
from hybrimoe.runtime.store import ExpertStore

from ..models import DENSE_OPTIONS, OPTIONS, done_in_loading, files_of, logits


def packing(directory: Path, **options: Any) -> bool:
    """Loads; True if experts were packed, False if a packed file was mapped."""
    calls: list[str] = []
    load(directory, **OPTIONS | {"progress": lambda *call: calls.append(call[2])} | options)
    return "packing experts" in calls


def test_the_second_start_maps_what_the_first_one_packed(directory: Path) -> None:
    first = load(directory, **OPTIONS)
    (file,) = files_of("experts", directory)
    written = file.stat().st_mtime_ns
    second = load(directory, **OPTIONS)
    store = second.hybrimoe.session.store
    assert isinstance(store, packed.MappedStore)
    assert store.buffer is store.mapped.array
    assert not store.buffer.flags.writeable
    assert np.array_equal(store.buffer, first.hybrimoe.session.store.buffer)
    assert torch.equal(logits(first), logits(second))
    assert file.stat().st_mtime_ns == written
    assert not list(directory.glob("*.partial"))


@pytest.mark.skipif(not is_watching(), reason="lost pages are not noticed on this system")
@pytest.mark.parametrize("accelerator", ["none", "emulated"])
def test_a_file_that_is_cut_while_it_is_in_use_ends_replies_and_not_the_process(
    accelerator: str, directory: Path
) -> None:
    options = OPTIONS | {"accelerator": accelerator}
    load(directory, **options)
    model = load(directory, **options)
    expected = logits(model)
    (file,) = files_of("experts", directory)
    os.truncate(file, record_file.PAGE_BYTES)  # pages that were touched are gone, too
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{file.name} was cut short.*Load the model again"):
            logits(model)
    with pytest.raises(CheckpointError, match="was cut short"):
        model.hybrimoe.full_state_dict()
    assert torch.equal(logits(load(directory, **options)), expected), "packed anew"


@pytest.mark.skipif(not is_watching(), reason="lost pages are not noticed on this system")
def test_a_compiled_step_whose_experts_are_lost_ends_the_reply(directory: Path) -> None:
    load(directory, **OPTIONS | {"dense_dtype": "float32"})
    model = load(directory, **OPTIONS | {"dense_dtype": "float32"})
    assert model.hybrimoe.step is not None
    generator, cache = TextGenerator(model, None), PrefixCache(model)
    generator.forward([1, 2, 3], cache)
    assert not generator.has_lost_experts
    (file,) = files_of("experts", directory)
    os.truncate(file, record_file.PAGE_BYTES)
    with pytest.raises(CheckpointError, match="was cut short"):
        generator.forward([4], cache)
    assert not cache.token_ids
    assert generator.has_lost_experts


def test_what_lies_in_the_cache_is_found_again_once_the_model_was_moved(directory: Path) -> None:
    expected = logits(load(directory, **DENSE_OPTIONS))
    (cache,) = record_file.folders(directory, beside=False)
    cache.mkdir(parents=True)
    for what in ("experts", "dense"):
        (file,) = files_of(what, directory)
        file.rename(cache / file.name)
    moved = directory.rename(directory.with_name("moved"))
    assert not done_in_loading(moved) & {"packing experts", "packing dense layers"}
    assert torch.equal(logits(load(moved, **DENSE_OPTIONS)), expected)
    os.utime(moved / "model.safetensors")
    assert done_in_loading(moved) >= {"packing experts", "packing dense layers"}, (
        "other weights, as far as one can tell"
    )


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
    (path,) = files_of("experts", directory)
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(CheckpointError, match="cut short"):
        packed.PackedFile(path, layers, record_file.PAGE_BYTES).read(pinned=False)


def test_a_changed_checkpoint_is_packed_again(directory: Path) -> None:
    before = logits(load(directory, **OPTIONS))
    tensors = load_file(directory / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key] = 2 * tensors[key]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert not torch.allclose(before, logits(load(directory, **OPTIONS)))
    assert not packing(directory)


def test_another_record_layout_is_packed_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packing(directory)
    monkeypatch.setattr(packed, "LAYOUT_VERSION", packed.LAYOUT_VERSION + 1)
    assert packing(directory)


def test_the_disk_tier_packs_straight_into_the_file(directory: Path) -> None:
    expected = load(directory, **OPTIONS, packed_file=False)
    model = load(directory, **OPTIONS, memory={"disk": "auto", "host": "1GiB"})
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
    assert files_of("experts", directory) == []


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
