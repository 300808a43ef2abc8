"""Loading never holds a second copy of the experts."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import GraniteMoeConfig, MixtralConfig, PreTrainedModel

from hybrimoe.checkpoint import load, reading
from tests.forked import Forked

from .conftest import SMALL

OPTIONS: dict[str, Any] = {"policy": "static", "accelerator": "none", "expert_dtype": "bfloat16", "progress": False}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 32, "num_hidden_layers": 6}
N_EXPERTS, N_LAYERS = 32, 6
SAMPLE_SECONDS = 0.002
SLACK_BYTES = 8 << 20  # allocator, Python objects, one chunk of a file being written is not resident


def own_bytes() -> int:
    """Memory of this process that is no file's, swapped or not: a system that takes cold pages back changes it not."""
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem", "VmSwap"))


def give_back_free_memory() -> None:
    """What the C library keeps of freed memory (a model that was saved) would else be given back while one measures."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """Yields a list that holds, at the end, how many bytes this process's own memory grew at most."""
    stop, growth = threading.Event(), [0]
    gc.collect()
    give_back_free_memory()
    before = own_bytes()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            growth[0] = max(growth[0], own_bytes() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield growth
    finally:
        stop.set()
        thread.join()
        growth[0] = max(growth[0], own_bytes() - before)


PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from {__name__} import measured
print(json.dumps(measured(*sys.argv[1:])))
"""
"""In a process of its own: what other tests have left in this one must not count."""


def measured(small: str, large: str) -> tuple[int, int, int]:
    """How many bytes loading the second of two checkpoints took at most, its experts' and its dense weights'."""
    load(small, **OPTIONS)  # imports and compiled kernels are not part of the footprint
    with peak_growth() as growth:
        model = load(large, **OPTIONS)
    dense_bytes = sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
    return growth[0], model.hybrimoe.session.store.nbytes, dense_bytes


@pytest.mark.parametrize("config_class", [MixtralConfig, GraniteMoeConfig], ids=["tensor-per-expert", "fused"])
def test_peak_memory_is_the_final_footprint_plus_less_than_a_layer(
    config_class: Any, directory: Path, tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    make_model(config_class(**SMALL | SIZES), dtype=torch.bfloat16).save_pretrained(tmp_path / "large")
    with Forked(PROGRAM, str(directory), str(tmp_path / "large")) as program:
        found, errors = program.communicate()
        assert program.returncode == 0, errors
    growth, experts_bytes, dense_bytes = json.loads(found)
    layer_bytes = experts_bytes // N_LAYERS
    assert experts_bytes > 8 * SLACK_BYTES
    assert growth <= experts_bytes + dense_bytes + layer_bytes + SLACK_BYTES
    assert growth > experts_bytes // 2, "the sampling saw the loading"


def test_the_second_start_needs_no_memory_for_the_experts(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    make_model(MixtralConfig(**SMALL | SIZES), dtype=torch.bfloat16).save_pretrained(tmp_path / "large")
    load(tmp_path / "large", **OPTIONS)
    with peak_growth() as growth:
        model = load(tmp_path / "large", **OPTIONS)
    assert growth[0] < model.hybrimoe.session.store.nbytes // 2


@pytest.mark.parametrize("dense_dtype", ["float32", "bfloat16"], ids=["as stored", "cast"])
def test_large_weights_around_the_experts_lie_on_huge_pages(
    directory: Path, monkeypatch: pytest.MonkeyPatch, dense_dtype: str
) -> None:
    rooms = []

    def page_aligned(n_bytes: int) -> Any:
        rooms.append(reading_aligned(n_bytes))
        return rooms[-1]

    reading_aligned = reading.page_aligned
    monkeypatch.setattr(reading, "page_aligned", page_aligned)
    monkeypatch.setattr(reading, "HUGE_PAGE", 1024)
    model = load(directory, **OPTIONS, dense_dtype=dense_dtype)
    there = [range(room.ctypes.data, room.ctypes.data + room.nbytes) for room in rooms]
    large = {name: weight for name, weight in model.named_parameters() if weight.nbytes >= 1024}
    assert len(large) > 4
    for name, weight in large.items():
        assert weight.dtype is getattr(torch, dense_dtype)
        assert any(weight.data_ptr() in room for room in there), name
