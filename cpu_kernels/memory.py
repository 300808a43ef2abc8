"""Memory for packed experts: page aligned, on huge pages where the system gives them (fewer TLB misses in streams)."""

import contextlib
import mmap

import numpy as np


def huge_pages(n_bytes: int) -> np.ndarray:
    """uint8 [n_bytes] of zeros; the array owns the mapping."""
    if n_bytes == 0:
        return np.empty(0, np.uint8)
    mapping = mmap.mmap(-1, n_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: ordinary ones do
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)
