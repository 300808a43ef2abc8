"""Files that are mapped into memory and cut short while they are in use."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpu_kernels.host import mapped
from cpu_kernels.host.mapped import MappedFile

PAGE = mapped._PAGE_BYTES
pytestmark = pytest.mark.skipif(not mapped.is_watching(), reason="lost pages are not noticed on this system")


def _file(folder: Path, n_pages: int = 8) -> Path:
    file = folder / "records"
    file.write_bytes(np.full(n_pages * PAGE, 7, np.uint8).tobytes())
    return file


def test_pages_that_do_not_come_are_zeros_and_counted(tmp_path: Path) -> None:
    file = _file(tmp_path)
    found = MappedFile(file, PAGE, 7 * PAGE)
    assert (found.array == 7).all()
    assert not found.array.flags.writeable
    os.truncate(file, 3 * PAGE)
    assert found.n_lost_pages == 0, "nobody has touched them"
    assert found.array.reshape(7, PAGE).sum(axis=1).tolist() == [7 * PAGE, 7 * PAGE, 0, 0, 0, 0, 0]
    assert found.n_lost_pages == 5
    assert not found.array[2 * PAGE :].any()
    assert found.n_lost_pages == 5, "once each"


def test_a_file_that_is_shorter_than_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size"):
        MappedFile(_file(tmp_path, 2), PAGE, 2 * PAGE)


def test_rows_of_files_that_are_gone_are_used_again(tmp_path: Path) -> None:
    gc.collect()
    before = int(mapped._table()[0])
    for _ in range(20):
        MappedFile(_file(tmp_path), 0, PAGE)
    gc.collect()
    assert int(mapped._table()[0]) <= before + 2


def test_other_files_end_the_process_as_before(tmp_path: Path) -> None:
    code = f"""
import numpy as np, os
from cpu_kernels.host.mapped import MappedFile
ours = MappedFile(__import__("pathlib").Path({str(_file(tmp_path))!r}), 0, {8 * PAGE})
other = np.memmap({str(tmp_path / "other")!r}, np.uint8, "w+", shape=({PAGE},))
os.truncate({str(tmp_path / "other")!r}, 0)
other.sum()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == -mapped._SIGBUS, done.stderr.decode()
