"""How many experts are packed at once: no more than take one packed layer together, counted, on any number of cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import OlmoeConfig, PreTrainedModel

from cpu_kernels import pack_expert
from hybrimoe.checkpoint import experts, load
from hybrimoe.checkpoint.conversion import ModelShapes
from hybrimoe.checkpoint.dense import meta_model, read_config
from hybrimoe.checkpoint.experts import WORKER_BYTES_PER_WEIGHT, layer_sources
from hybrimoe.checkpoint.formats.source import scaled
from hybrimoe.checkpoint.source import read_config_dict
from hybrimoe.checkpoint.weights import open_weights
from hybrimoe.experts.layout import find_experts, read

OPTIONS: dict[str, Any] = {"policy": "static", "accelerator": "none", "progress": False, "packed_file": False}
HIDDEN, INTER, N_EXPERTS = 64, 64, 64
BYTES = {"int4": 4.5 / 8, "int8": 8.5 / 8, "bfloat16": 2.0, "float32": 4.0}  # of a weight in a record
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": INTER, "num_experts": N_EXPERTS, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> Path:
    """In bfloat16."""
    make_model(OlmoeConfig(**SIZES), dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", BYTES)
def test_workers_are_counted_against_the_layer_as_it_is_packed(
    dtype: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def pool(workers: int) -> ThreadPoolExecutor:
        found.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(experts, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(experts, "os", SimpleNamespace(cpu_count=lambda: 64))
    load(checkpoint, **OPTIONS, expert_dtype=dtype)
    fit = int(N_EXPERTS * BYTES[dtype] // WORKER_BYTES_PER_WEIGHT)
    assert found == [min(fit, experts.MAX_WORKERS)] * 2
    assert found[0] * WORKER_BYTES_PER_WEIGHT <= N_EXPERTS * BYTES[dtype]


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (None, 1)])
def test_there_are_no_more_workers_than_cores(
    cores: int | None, workers: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    monkeypatch.setattr(experts, "ThreadPoolExecutor", lambda n: found.append(n) or ThreadPoolExecutor(n))
    monkeypatch.setattr(experts, "os", SimpleNamespace(cpu_count=lambda: cores))
    load(checkpoint, **OPTIONS, expert_dtype="bfloat16")
    assert found == [workers] * 2


@pytest.mark.parametrize("dtype", ["int4", "bfloat16"])
def test_a_worker_takes_half_of_what_is_counted_for_it(dtype: str, checkpoint: Path) -> None:
    """The other half is for what the C library keeps."""
    raw = read_config_dict(checkpoint)
    config = read_config(checkpoint)
    model = meta_model(config, torch.bfloat16)
    plan = open_weights(checkpoint, raw).plan(model)
    shapes = ModelShapes(config, {name: tensor.shape for name, tensor in model.state_dict().items()})
    source = layer_sources({path: read(one) for path, one in find_experts(model)}, plan.conversions)[0]
    spec, reader = source.layout.spec(dtype), source.reader(shapes)
    record = np.empty(spec.record_bytes, np.uint8)

    def work() -> None:
        pack_expert(spec, reader.expert(0), record)

    work()
    assert 0 < taken(work) <= WORKER_BYTES_PER_WEIGHT // 2 * 3 * HIDDEN * INTER


def test_codes_are_scaled_in_the_memory_of_the_result() -> None:
    codes = torch.randint(0, 16, (256, 512), dtype=torch.uint8)
    scales, zeros = torch.rand(256, 4), torch.randint(0, 16, (256, 4)).float()
    expected = (codes.float() - zeros.repeat_interleave(128, 1)) * scales.repeat_interleave(128, 1)
    assert torch.equal(scaled(codes, scales, zeros), expected)
    assert taken(lambda: scaled(codes, scales, zeros)) < 1.1 * expected.nbytes
    order = torch.randperm(512) % 4
    assert torch.equal(scaled(codes, scales, zeros, order), (codes.float() - zeros[:, order]) * scales[:, order])
    of_columns = torch.rand(512, 2)  # of codes that lie the other way round, as AWQ's
    assert torch.equal(scaled(codes.T, of_columns), codes.T.float() * of_columns.repeat_interleave(128, 1))


def taken(work: Callable[[], Any]) -> int:
    """Bytes of tensors that `work` has at once at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
