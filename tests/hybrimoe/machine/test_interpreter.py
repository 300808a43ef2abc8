"""Python's memory on huge pages: what fills them is moved and keeps its contents, what does not is left alone."""

from __future__ import annotations

import mmap
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cpu_kernels.host.memory import HUGE_PAGE
from hybrimoe.bench.overhead import Experts
from hybrimoe.machine import interpreter
from hybrimoe.machine.interpreter import gather_beside, gather_on_huge_pages
from hybrimoe.runtime import RuntimeConfig, Session, session

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked for on Linux")


def of_mapping(address: int, name: str) -> int:
    """Bytes of `name` in /proc/self/smaps, of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        head, *rest = line.split()
        if "-" in head and not head.endswith(":"):
            start, end = (int(place, 16) for place in head.split("-"))
            inside = start <= address < end
        elif inside and head == f"{name}:":
            return int(rest[0]) << 10
    raise AssertionError(f"no mapping holds {address:#x}")


def mapped(n_pages: int) -> np.ndarray:
    """uint8 of the size of n_pages huge pages, none of which is in memory yet."""
    return np.frombuffer(mmap.mmap(-1, n_pages * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


@pytest.fixture
def filled() -> np.ndarray:
    """Four huge pages' worth of memory, on small ones. Skips where the system has no huge pages to give."""
    memory = mapped(4)
    memory[:] = np.arange(memory.size) % 251
    assert of_mapping(memory.ctypes.data + HUGE_PAGE, "Rss") >= memory.size
    probe = mapped(3)
    probe[:] = 1
    middle = (probe.ctypes.data // HUGE_PAGE + 1) * HUGE_PAGE
    if interpreter.collapse(middle, HUGE_PAGE) == 0:
        pytest.skip("this system gives no huge pages to who asks (Linux before 6.1)")
    return memory


def test_filled_memory_is_moved_and_keeps_its_contents(filled: np.ndarray) -> None:
    assert gather_on_huge_pages() >= 3 * HUGE_PAGE
    assert of_mapping(filled.ctypes.data + 2 * HUGE_PAGE, "AnonHugePages") >= 3 * HUGE_PAGE
    assert np.array_equal(filled, (np.arange(filled.size) % 251).astype(np.uint8))


def test_memory_that_would_have_to_be_filled_up_is_left_alone(filled: np.ndarray) -> None:
    sparse = mapped(16)
    sparse[:: 2 * mmap.PAGESIZE] = 1
    before = resident_bytes(sparse)
    gather_on_huge_pages()
    assert resident_bytes(sparse) == before == sparse.size // 2


def test_nothing_is_moved_where_the_system_says_never(
    filled: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "SETTING", tmp_path / "enabled")
    assert gather_on_huge_pages() == 0
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert gather_on_huge_pages() == 0
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert gather_on_huge_pages() > 0


@pytest.mark.parametrize("streams", [True, False])
def test_a_session_moves_it_where_its_experts_are_large(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(session, "gather_beside", lambda: started.append(True))
    if streams:
        monkeypatch.setattr(session, "LEAST_STREAMED_BYTES", 1)
    made = Session(RuntimeConfig("none"))
    made.add_layer("experts", Experts(2, 64, 32))
    made.finalize()
    made.start()
    made.close()
    assert started == [True] * streams


def test_it_is_moved_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def gathered(rests: float) -> None:
        assert rests == interpreter.RESTS
        threads.append(threading.current_thread())

    monkeypatch.setattr(interpreter, "gather_on_huge_pages", gathered)
    monkeypatch.setattr(interpreter, "AFTER_S", 0.01)
    thread = gather_beside()
    thread.join()
    assert threads == [thread]
    assert thread.daemon


def resident_bytes(memory: np.ndarray) -> int:
    """How much of an array is in memory."""
    first, n_pages = memory.ctypes.data // mmap.PAGESIZE, memory.size // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        pages.seek(8 * first)
        entries = np.frombuffer(pages.read(8 * n_pages), np.uint64)
    return int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE


def test_beside_a_program_at_work_it_rests_after_every_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    asked: list[int] = []
    rested: list[float] = []

    def collapse(start: int, n_bytes: int) -> int:
        asked.append(n_bytes)
        clock[0] += 0.01
        return n_bytes

    monkeypatch.setattr(interpreter, "collapse", collapse)
    monkeypatch.setattr(interpreter, "_allowed", lambda: True)
    monkeypatch.setattr(interpreter, "_filled", lambda pages: iter([(0, 3 * HUGE_PAGE), (8 * HUGE_PAGE, HUGE_PAGE)]))
    monkeypatch.setattr(
        interpreter,
        "time",
        SimpleNamespace(perf_counter=lambda: clock[0], sleep=lambda seconds: rested.append(seconds)),
    )
    assert gather_on_huge_pages(5.0) == 4 * HUGE_PAGE
    assert asked == [HUGE_PAGE] * 4
    assert rested == pytest.approx([0.05] * 4)
