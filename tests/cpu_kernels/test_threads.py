"""The number of threads, where they are pinned, and what torch sees of them."""

import os
import subprocess
import sys

import pytest

import cpu_kernels as ck
from cpu_kernels.host import threads


def test_as_many_threads_as_physical_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(threads.ENV_THREADS, raising=False)
    assert 1 <= threads.physical_cores() <= (os.cpu_count() or 1)
    assert threads.resolve_threads() <= threads.physical_cores()
    assert threads.resolve_threads(1) == 1


def test_hyper_threads_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads.physical_cores.cache_clear()
    monkeypatch.setattr(threads, "_core_of", lambda cpu: "0-1")
    assert threads.physical_cores() == 1
    threads.physical_cores.cache_clear()


def test_thread_counts_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ck.ThreadingError, match="asked for 0"):
        threads.resolve_threads(0)
    with pytest.raises(ck.ThreadingError, match="the CPUs that this process may use"):
        threads.resolve_threads(10_000)
    monkeypatch.setenv(threads.ENV_THREADS, "many")
    with pytest.raises(ck.ThreadingError, match="'many' is not a number"):
        threads.resolve_threads()
    monkeypatch.setenv(threads.ENV_THREADS, "10000")  # a default, not a demand: the CPUs are the limit
    assert threads.resolve_threads() >= 1


PROBE = """
import numpy as np, torch
torch.set_num_threads(1)
import cpu_kernels as ck
spec = ck.ExpertSpec(256, 512, "int8")
record = np.zeros(spec.record_bytes, np.uint8)
w = torch.zeros(512, 256)
ck.pack_expert(spec, ck.ExpertWeights(w, w.T.contiguous(), w), record)
d = ck.build_dispatch(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), 1)
x, y = np.ones((1, 256), np.float32), np.ones((1, 256), np.float32)
ck.get_backend("numba").run(spec, np.array([record.ctypes.data], np.uint64), np.zeros(1, np.int32), d, x, y)
print(torch.get_num_threads())
"""


def test_torch_keeps_its_thread_count() -> None:
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pinning needs sched_setaffinity (Linux)")
def test_pinning_is_an_option() -> None:
    """With HYBRIMOE_PIN=1 a thread of the team may run on one CPU only, and the calling thread on all of its own."""
    code = PROBE + (
        "import os, threading\n"
        "sets = [os.sched_getaffinity(int(task)) for task in os.listdir('/proc/self/task')]\n"
        "print(min(map(len, sets)), len(os.sched_getaffinity(threading.get_native_id())))\n"
    )
    counts = {}
    for pin in ("0", "1"):
        environment = os.environ | {"HYBRIMOE_PIN": pin}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        counts[pin] = [int(word) for word in result.stdout.split()[1:]]
    cpus = len(os.sched_getaffinity(0))
    assert counts["0"] == [cpus, cpus]
    assert counts["1"] == [1, cpus]


def test_object_code_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    from cpu_kernels.jit import cache_dir

    cache_dir.kernel_cache_dir.cache_clear()
    monkeypatch.setenv(cache_dir.ENV_CACHE, "/proc/nowhere")
    assert cache_dir.kernel_cache_dir() is None  # compile in memory, every start
    cache_dir.kernel_cache_dir.cache_clear()
    monkeypatch.setenv(cache_dir.ENV_CACHE, str(tmp_path))
    place = cache_dir.kernel_cache_dir()
    assert place is not None
    assert place.is_dir()
    cache_dir.kernel_cache_dir.cache_clear()
