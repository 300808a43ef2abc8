"""Memory for packed experts."""

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from cpu_kernels.host.memory import HUGE_PAGE, page_aligned


@pytest.mark.parametrize("n_bytes", [0, 1, 4096, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_zeroed_aligned_and_writable(n_bytes: int) -> None:
    memory = page_aligned(n_bytes)
    assert memory.shape == (n_bytes,)
    assert memory.dtype == np.uint8
    assert not memory.any()
    if n_bytes:
        assert memory.ctypes.data % mmap.PAGESIZE == 0
        memory[:] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_buffer_asks_for_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel has no transparent huge pages")
    memory = page_aligned(4 * HUGE_PAGE)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and not line.split(" ", 1)[0].endswith(":"):
            start, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
            inside = start <= memory.ctypes.data < end
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            assert "sh" not in line.split()  # shared memory has a setting of its own, which is off
            return
    pytest.fail("the buffer is in no mapping")


def test_a_system_without_huge_pages_gets_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert page_aligned(HUGE_PAGE).size == HUGE_PAGE
