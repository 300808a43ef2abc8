"""The memory of Python itself on huge pages: what runs between two layers is then found with a few page walks.

Kernels that stream megabytes of weights drive page translations out of the processor as well as data. Python's objects
lie scattered over hundreds of small pages, and in a virtual machine each walk to one is up to 24 reads.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cpu_kernels.host.memory import HUGE_PAGE

MADV_COLLAPSE = 25
"""madvise option, linux/mman.h, since Linux 6.1: fills a huge page with what lies there now, and does so at once."""
LARGEST_BYTES = 512 << 20
"""Mappings beyond this hold weights, not objects, and would take seconds."""
LEAST_PRESENT = 0.9
"""Share of a huge page's small pages that must be in memory: what is filled up with zeros is memory that is lost."""
ENTRY_BYTES, PRESENT = 8, np.uint64(1 << 63)
"""Of a small page in /proc/self/pagemap (proc_pid_pagemap(5))."""
AFTER_S = 10.0
"""From the start of a session on: trial runs and the first requests of a server are over by then."""
RESTS = 9.0
"""Times as long as a page has taken is left to others before the next one, beside a program at work. Without rests the
parts of a prompt took four times as long for 4.6 seconds (one MoE layer on two cores, measured)."""
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def gather_beside() -> threading.Timer:
    """`gather_on_huge_pages` in a thread of its own, which nobody has to wait for (0.6 s of processor time for 200 MiB,
    in a virtual machine), once the program has started: a start has no processor to spare. Page by page, with rests.
    Returns the thread."""
    thread = threading.Timer(AFTER_S, gather_on_huge_pages, (RESTS,))
    thread.name, thread.daemon = "hybrimoe-huge-pages", True
    thread.start()
    return thread


def gather_on_huge_pages(rests: float = 0.0) -> int:
    """Moves the heap and other private memory of this process onto huge pages, where it fills them. Returns the bytes
    that lie on such pages then: 0 where the system has none, or its owner has switched them off.

    Contents and addresses stay. Once everything is loaded, for what is made later lies where it comes to lie.
    rests: times as long as each huge page has taken nothing is done; 0: neighbours are moved together.
    """
    if not sys.platform.startswith("linux") or not _allowed():
        return 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            filled = _filled(pages.fileno())
            if not rests:
                return sum(collapse(start, n_bytes) for start, n_bytes in filled)
            each = (at for start, n_bytes in filled for at in range(start, start + n_bytes, HUGE_PAGE))
            return sum(_collapse_gently(at, rests) for at in each)
    except OSError:  # a system that shows no process its own pages
        return 0


def collapse(start: int, n_bytes: int) -> int:
    """Moves the memory at an address, whole huge pages. Returns n_bytes, or 0 where the system has not moved all."""
    refused = ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(n_bytes), MADV_COLLAPSE)
    return 0 if refused else n_bytes


def _collapse_gently(start: int, rests: float) -> int:
    """`collapse` of one huge page, and a rest."""
    began = time.perf_counter()
    moved = collapse(start, HUGE_PAGE)
    time.sleep(rests * (time.perf_counter() - began))
    return moved


def _allowed() -> bool:
    """Whether the system has huge pages for who asks."""
    try:
        return "[never]" not in SETTING.read_text(encoding="utf-8")
    except OSError:
        return False


def _filled(pages: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of what fills huge pages within writable private memory that is no file's. Neighbours come
    together, for the system waits for all of its processors at the start of each move."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        places, rights, *_, name = (line + " ").split(" ", 5)
        start, end = (int(place, 16) for place in places.split("-"))
        is_memory = name.strip() in ("", "[heap]") or name.strip().startswith("[anon:")
        if rights != "rw-p" or not is_memory or end - start > LARGEST_BYTES:
            continue
        first = at = -(-start // HUGE_PAGE) * HUGE_PAGE
        while at + HUGE_PAGE <= end:
            fills = _present(pages, at) >= LEAST_PRESENT
            if not fills and first < at:
                yield first, at - first
            at += HUGE_PAGE
            first = first if fills else at
        if first < at:
            yield first, at - first


def _present(pages: int, start: int) -> float:
    """Share of the small pages of a huge page's range that are in memory."""
    n_pages = HUGE_PAGE // mmap.PAGESIZE
    entries = os.pread(pages, n_pages * ENTRY_BYTES, start // mmap.PAGESIZE * ENTRY_BYTES)
    return float(np.count_nonzero(np.frombuffer(entries, np.uint64) & PRESENT) / n_pages)
