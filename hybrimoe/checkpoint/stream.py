"""Packs the experts of a checkpoint into a store: a few experts at a time, each on one thread of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cpu_kernels.host.threads import torch_threads
from hybrimoe.checkpoint.conversion import ModelShapes
from hybrimoe.checkpoint.experts import ExpertReader, LayerSource
from hybrimoe.checkpoint.progress import Progress
from hybrimoe.checkpoint.source import listed
from hybrimoe.errors import CheckpointError
from hybrimoe.runtime.store import ExpertStore

MAX_WORKERS = 8  # beyond it, disk and memory bandwidth decide
EXPERTS_PER_WORKER = 10
"""Of a layer: packing an expert takes up to 20 bytes a weight for a while (measured, int4), ten times its bfloat16
size, so that all workers together stay below one layer of the checkpoint."""


def pack_experts(store: ExpertStore, sources: Sequence[LayerSource], shapes: ModelShapes, show: Progress) -> None:
    """Reads every layer of `store` from its source (by path) and packs it.

    In memory at a time, beside the store: a few experts, less than one layer of the checkpoint. `show` is called from
    this thread. Raises CheckpointError for what does not match or is not finite, naming the checkpoint's tensors.
    """
    by_path = {source.path: source for source in sources}
    done = 0
    for layer, spec in enumerate(store.layers):
        reader = by_path[spec.path].reader(shapes)
        workers = max(1, min(os.cpu_count() or 1, MAX_WORKERS, spec.num_experts // EXPERTS_PER_WORKER))
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(partial(_pack, store, layer, reader), range(spec.num_experts)):
                done += spec.spec.record_bytes
                show(done, store.nbytes, "packing experts")


def _pack(store: ExpertStore, layer: int, reader: ExpertReader, expert: int) -> None:
    try:
        with torch_threads(1):
            store.write(layer, expert, reader.expert(expert))
    except CheckpointError as error:
        names = listed(reader.source.source_keys(expert))
        if names in str(error):
            raise
        raise CheckpointError(f"{error} (from {names})") from error
