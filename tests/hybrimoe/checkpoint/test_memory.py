"""Loading never holds a second copy of the experts."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import GraniteMoeConfig, MixtralConfig, PreTrainedModel

from hybrimoe.checkpoint import load

from .conftest import SMALL

OPTIONS: dict[str, Any] = {"policy": "static", "accelerator": "none", "expert_dtype": "bfloat16", "progress": False}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 32, "num_hidden_layers": 6}
N_EXPERTS, N_LAYERS = 32, 6
SAMPLE_SECONDS = 0.002
SLACK_BYTES = 8 << 20  # allocator, Python objects, one chunk of a file being written is not resident


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """Yields a list that holds, at the end, how many bytes the resident memory grew at most."""
    process, stop, growth = psutil.Process(), threading.Event(), [0]
    gc.collect()
    before = process.memory_info().rss

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            growth[0] = max(growth[0], process.memory_info().rss - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield growth
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("config_class", [MixtralConfig, GraniteMoeConfig], ids=["tensor-per-expert", "fused"])
def test_peak_memory_is_the_final_footprint_plus_less_than_a_layer(
    config_class: Any, directory: Path, tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    load(directory, **OPTIONS)  # imports and compiled kernels are not part of the footprint
    make_model(config_class(**SMALL | SIZES), dtype=torch.bfloat16).save_pretrained(tmp_path / "large")
    with peak_growth() as growth:
        model = load(tmp_path / "large", **OPTIONS)
    experts_bytes = model.hybrimoe.session.store.nbytes
    dense_bytes = sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
    layer_bytes = experts_bytes // N_LAYERS
    assert experts_bytes > 8 * SLACK_BYTES
    assert growth[0] <= experts_bytes + dense_bytes + layer_bytes + SLACK_BYTES
    assert growth[0] > experts_bytes // 2, "the sampling saw the loading"


def test_the_second_start_needs_no_memory_for_the_experts(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    make_model(MixtralConfig(**SMALL | SIZES), dtype=torch.bfloat16).save_pretrained(tmp_path / "large")
    load(tmp_path / "large", **OPTIONS)
    with peak_growth() as growth:
        model = load(tmp_path / "large", **OPTIONS)
    assert growth[0] < model.hybrimoe.session.store.nbytes // 2
