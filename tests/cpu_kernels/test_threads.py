"""The pool: size, layer, and what torch sees of it."""

import os
import subprocess
import sys

import pytest

import cpu_kernels as ck
from cpu_kernels.host import threads


def test_pool_is_sized_to_physical_cores(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(ck.ThreadingError, match="NUMBA_NUM_THREADS"):
        threads.resolve_threads(10_000)
    monkeypatch.setenv(threads.ENV_THREADS, "many")
    with pytest.raises(ck.ThreadingError, match="'many' is not a number"):
        threads.resolve_threads()
    monkeypatch.setenv(threads.ENV_THREADS, "10000")  # a default, not a demand: the pool is the limit
    assert threads.resolve_threads() >= 1


def test_layer_is_safe() -> None:
    assert threads.start_pool(2) in threads.SAFE_LAYERS


def test_workqueue_is_refused_for_more_than_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_layer", ["workqueue"])
    with pytest.raises(ck.ThreadingError, match="pip install tbb"):
        threads.start_pool(2)
    assert threads.start_pool(1) == "workqueue"


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
    """With HYBRIMOE_PIN=1 a thread of the pool may run on one CPU only, and the calling thread on all of its own."""
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


def test_read_only_cache_directory_is_said_and_survived(tmp_path: object) -> None:
    """No writable place at all: one warning, right results."""
    code = (
        "import numba.core.caching as c\n"
        "def no_locator(cls, *a): return None\n"
        "c._CacheLocator.from_function = classmethod(no_locator)\n"
        "for l in list(c.CacheImpl._locator_classes): l.from_function = classmethod(no_locator)\n"
        "import warnings; warnings.simplefilter('always')\n"
        "import numpy as np, cpu_kernels as ck\n"
        "d = ck.build_dispatch(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), 1)\n"
        "print(d.rows.tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[0]"
    assert "NUMBA_CACHE_DIR" in result.stderr


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
