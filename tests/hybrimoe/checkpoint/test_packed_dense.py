"""Packed dense layers: kept beside the experts, read at the second start, made anew when half, stale or another's."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteMoeConfig, MixtralConfig, PreTrainedModel

from hybrimoe.checkpoint import PackedFileWarning, load, record_file, safetensors_file
from hybrimoe.checkpoint.safetensors_file import StoredTensor, open_safetensors
from hybrimoe.dense.linear import PackedLinear
from hybrimoe.errors import CheckpointError

from .conftest import SMALL
from .test_memory import SLACK_BYTES, peak_growth

TOKENS = torch.arange(3, 15)[None]
OPTIONS: dict[str, Any] = {
    "policy": "static", "accelerator": "none", "expert_dtype": "int4", "dense_dtype": "int8", "progress": False,
}  # fmt: skip
LARGE = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 6, "vocab_size": 65536}
WRITE = """
import os, signal, sys
from pathlib import Path
import torch
from cpu_kernels import LinearSpec
from hybrimoe.checkpoint import packed_dense, record_file
from hybrimoe.checkpoint.packed_dense import DenseSource
from hybrimoe.dense.records import DenseRecords, LinearEntry
source = DenseSource((LinearEntry("layer", LinearSpec(64, 64, "int8"), torch.bfloat16),), {})
header = packed_dense.describe(source, ())
records = DenseRecords(source.entries)
records.buffer[:] = 7
place = Path(sys.argv[1])
show = lambda *call: None
"""


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=TOKENS).logits
    return output


def dense_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("dense-*.hybrimoe"))


def expert_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("experts-*.hybrimoe"))


def done_in(directory: Path, **options: Any) -> set[str]:
    """Loads; what it showed as its progress."""
    calls: set[str] = set()
    load(directory, **OPTIONS | {"progress": lambda *call: calls.add(call[2])} | options)
    return calls


def records_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    return {path: module._record for path, module in model.named_modules() if isinstance(module, PackedLinear)}


def test_the_second_start_packs_nothing_and_reads_nothing_that_is_packed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(directory, **OPTIONS)
    assert len(dense_files(directory)) == len(expert_files(directory)) == 1
    keys: list[str] = []
    real = safetensors_file._read

    def noted(tensor: StoredTensor, offset_bytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        keys.append(tensor.key)
        return real(tensor, offset_bytes, shape)

    monkeypatch.setattr(safetensors_file, "_read", noted)
    calls: list[str] = []
    second = load(directory, **OPTIONS | {"progress": lambda *call: calls.append(call[2])})
    assert set(calls) == {"reading packed dense layers"}
    assert len(keys) == len(set(keys)), "nothing is read twice"
    one, other = records_of(first), records_of(second)
    assert not [key for key in keys if "experts" in key or key.removesuffix(".weight") in one]
    assert "model.embed_tokens.weight" in keys
    assert list(one) == list(other)
    assert all(np.array_equal(record, other[path]) for path, record in one.items())
    assert torch.equal(logits(first), logits(second))


def test_packing_while_loading_gives_what_packing_a_loaded_model_gives(
    directory: Path, mixtral: PreTrainedModel
) -> None:
    loaded = records_of(load(directory, **OPTIONS))
    for path, record in loaded.items():
        linear = mixtral.get_submodule(path)
        assert isinstance(linear, torch.nn.Linear)
        assert np.array_equal(PackedLinear(linear, "int8")._record, record)
    assert "model.layers.0.self_attn.q_proj" in loaded


def test_each_dense_dtype_has_a_file_and_the_experts_are_kept_once(directory: Path) -> None:
    assert "packing experts" in done_in(directory)
    again = done_in(directory, dense_dtype="int4")
    assert "packing dense layers" in again
    assert "packing experts" not in again
    assert (len(dense_files(directory)), len(expert_files(directory))) == (2, 1)
    for dtype in ("int8", "int4"):
        assert "packing dense layers" not in done_in(directory, dense_dtype=dtype)


def test_it_can_be_left_out(directory: Path) -> None:
    assert "packing dense layers" in done_in(directory, packed_file=False)
    assert dense_files(directory) == []


@pytest.mark.parametrize("damage", ["short", "long", "magic", "header", "empty"])
def test_a_half_or_damaged_file_is_not_used(damage: str, directory: Path) -> None:
    expected = logits(load(directory, **OPTIONS))
    (file,) = dense_files(directory)
    data = file.read_bytes()
    changed = {
        "short": data[:-64],
        "long": data + bytes(64),
        "magic": b"X" + data[1:],
        "header": data.replace(b'"format": 1', b'"format": 0'),
        "empty": b"",
    }
    file.write_bytes(changed[damage])
    assert torch.equal(logits(load(directory, **OPTIONS)), expected)
    assert file.read_bytes() == data, "packed again"


def test_other_dense_weights_of_the_same_size_and_time_are_packed_again(directory: Path) -> None:
    done_in(directory)
    file = directory / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "packing dense layers" in done_in(directory)


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


def test_a_model_directory_that_cannot_be_written_uses_the_cache(
    directory: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = record_file.whole_or_nothing

    def read_only(path: Path, header: dict[str, Any], n_bytes: int) -> Any:
        if path.parent == directory:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, header, n_bytes)

    monkeypatch.setattr(record_file, "whole_or_nothing", read_only)
    done_in(directory)
    assert dense_files(directory) == []
    assert len(dense_files(own_cache)) == 1
    assert done_in(directory) == {"reading packed dense layers"}


def test_a_full_disk_is_a_warning_and_leaves_nothing_behind(
    directory: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(PackedFileWarning, match="No space left on device") as caught:
        model = load(directory, **OPTIONS)
    assert ["packed dense layers" in str(warning.message) for warning in caught] == [True, False]
    assert logits(model).isfinite().all()
    assert not [file for place in (directory, own_cache) for file in place.rglob("dense-*")]


def run(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITE + script, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def test_a_kill_while_writing_leaves_a_half_file_that_is_swept_away(directory: Path) -> None:
    stop = "record_file._sync_folder = os.fsync = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
    killed = run(stop + "packed_dense.write(place, source, records, header)", directory)
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert dense_files(directory) == []
    assert len(list(directory.glob("*.partial"))) == 1
    assert "packing dense layers" in done_in(directory)
    assert list(directory.glob("*.partial")) == []


def test_two_processes_write_and_read_at_once(tmp_path: Path) -> None:
    script = """
for _ in range(15):
    packed_dense.write(place, source, records, header)
    assert (packed_dense.read((place,), source, header, show).buffer == 7).all()
"""
    processes = [run(script, tmp_path / "model") for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len(dense_files(tmp_path)) == 1


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "apart"])
def test_an_output_layer_tied_to_the_embedding(
    tie: bool, tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    config = GraniteMoeConfig(**SMALL | {"tie_word_embeddings": tie})
    make_model(config).save_pretrained(tmp_path / "granite")
    first, second = (load(tmp_path / "granite", **OPTIONS) for _ in range(2))
    assert isinstance(second.lm_head, PackedLinear)
    assert torch.equal(logits(first), logits(second))
    assert torch.equal(second.model.embed_tokens.weight, first.model.embed_tokens.weight)


def test_values_that_are_not_finite_name_their_tensor(edit: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] = torch.nan

    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight has values that are NaN"):
        load(edit(damage), **OPTIONS)


def test_no_weight_is_there_twice_while_it_is_packed(
    directory: Path, tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    load(directory, **OPTIONS)  # imports and compiled kernels are not part of the footprint
    make_model(MixtralConfig(**SMALL | LARGE), dtype=torch.bfloat16).save_pretrained(tmp_path / "large")
    for start in ("first", "second"):
        with peak_growth() as growth:
            model = load(tmp_path / "large", **OPTIONS)
        kept = model.hybrimoe.dense.nbytes + sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
        kept += model.hybrimoe.session.store.nbytes if start == "first" else 0
        largest = model.get_input_embeddings().weight.nbytes
        room = SLACK_BYTES + largest // 2  # rows that are being packed, the allocator; a copy more would be seen
        assert growth[0] <= kept + largest + room, start
        del model
