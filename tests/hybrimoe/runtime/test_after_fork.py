"""A process made by fork after a session has computed: it has none of the threads, and computes all the same."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpu_kernels import page_aligned
from hybrimoe.runtime.tier import reader as reader_module
from hybrimoe.runtime.tier.reader import BLOCK_BYTES, Read, RecordReader, Urgency
from scheduler.lossy import resolve_lossy

from .conftest import routing

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
N_EXPERTS, TOP_K = 8, 4
HANG_SECONDS = 120


def in_a_child(work: Callable[[], bool]) -> bool:
    """What `work` returns in a forked process; False where it fails or hangs there."""
    child = os.fork()
    if child == 0:
        signal.alarm(HANG_SECONDS)
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"backend": "numba"},
        {"backend": "torch"},
        {"backend": "onnx"},
        {"lossy": resolve_lossy({"kind": "defer", "experts": 2, "immediate": 2})},
    ],
    ids=["numba", "torch", "onnx", "deferred experts"],
)
def test_every_way_to_compute_experts(make_rig: Callable[..., Any], settings: dict[str, Any]) -> None:
    if settings.get("backend") == "onnx":
        pytest.importorskip("onnxruntime")
    rig = make_rig(n_experts=N_EXPERTS, accelerator="none", threads=2, **settings)

    def step() -> torch.Tensor:
        rig.session.announce_step("decode")
        return torch.cat([rig.call(layer, *routing(1, N_EXPERTS, TOP_K, layer)) for layer in range(3)])

    expected = step()
    assert in_a_child(lambda: torch.equal(step(), expected))
    assert torch.equal(step(), expected)


def test_reads_of_the_disk_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read has ended before, one is under way in the other process, one waits, and one comes."""
    path, content = tmp_path / "records", os.urandom(4 * BLOCK_BYTES)
    path.write_bytes(content)
    here, read_at, began, go = os.getpid(), reader_module._read_at, threading.Event(), threading.Event()

    def slowly(descriptor: int, into: memoryview, offset_bytes: int) -> int:
        if offset_bytes and os.getpid() == here:
            began.set()
            assert go.wait(600)
        return read_at(descriptor, into, offset_bytes)

    monkeypatch.setattr(reader_module, "_read_at", slowly)
    with RecordReader(path, n_threads=1) as reader:
        reads = [
            Read(at, page_aligned(BLOCK_BYTES).data, at * BLOCK_BYTES, BLOCK_BYTES, Urgency.AHEAD, "a record")
            for at in range(4)
        ]
        reader.submit(reads[0])
        reader.wait()
        reader.submit(reads[1])
        reader.submit(reads[2])
        assert began.wait(600)

        def all_come() -> bool:
            reader.submit(reads[3])
            ended = list(reader.take_ended())
            while len(ended) < 4:
                reader.wait()
                ended += reader.take_ended()
            return {read.key for read in ended} == {0, 1, 2, 3} and b"".join(
                bytes(read.into) for read in reads
            ) == content  # fmt: skip

        came = in_a_child(all_come)
        go.set()
        assert came
