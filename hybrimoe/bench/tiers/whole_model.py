"""The measurement behind `hybrimoe bench tiers --system-limit`: whole models, each under the same limit of the system.

A model of random weights is written as a GGUF file, which llama.cpp maps, and packed from it for ours: the contenders
compute with the same 4-bit numbers. Every round each of them is a process of its own in a new memory group, in which
allocated memory and the page cache count alike, and nothing of its files is in memory before.

Random routers would spread tokens evenly. The experts are those of `layers.routes_of` instead: the embedding of token i
points to the rows of the routers that token i of the routing is to go to.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.host.threads import resolve_threads
from hybrimoe.amounts import size_text
from hybrimoe.bench.model.sources import RandomSource
from hybrimoe.bench.rounds import busy_warning, spread
from hybrimoe.bench.tiers import contender
from hybrimoe.bench.tiers.contender import DTYPE, LLAMA_CPP, Job
from hybrimoe.bench.tiers.layers import Request, Routes, disk_gbps, require_room, routes_of
from hybrimoe.bench.tiers.memory_group import memory_group
from hybrimoe.checkpoint.converting import convert
from hybrimoe.checkpoint.pack.manifest import read_manifest
from hybrimoe.errors import BudgetError, HybriMoEError, ModelError
from hybrimoe.machine.facts import machine
from hybrimoe.runtime.tier.disk_speed import drop_from_page_cache
from hybrimoe.runtime.tier.usage import SUFFIX

SEED = 0
ROUTED_RMS = 8.0
"""Of the embedding of a token whose experts are given: what attention and experts add to it (below 1 a layer, with
random weights) does not change where it is routed to."""
BLOCK = 32
"""Weights that share a scale."""
LEAST_COSINE = 0.99
"""Of the logits at the end to ours. Where all experts are in memory decode steps are compiled as a whole, and round
elsewhere; llama.cpp rounds what it multiplies as well."""
OURS = ("ours", "mmap", "static")
SAME_BITS = ("ours", "static")


@dataclass(frozen=True, slots=True)
class Files:
    """One model: the GGUF file, and the pack of it."""

    gguf: Path
    pack: Path

    @property
    def expert_file(self) -> Path:
        """The packed experts."""
        manifest = read_manifest(self.pack)
        assert manifest is not None
        assert manifest.experts is not None
        return self.pack / manifest.experts

    def dense_bytes(self) -> int:
        """Of all that is not experts: the pack's, which are more than the GGUF file's."""
        whole = sum(file.stat().st_size for file in self.pack.iterdir())
        return whole - self.expert_file.stat().st_size

    def make_cold(self) -> None:
        """Nothing of them is in memory, and nothing is known of earlier rounds."""
        for usage in self.pack.glob(f"*{SUFFIX}"):
            usage.unlink()
        for file in (self.gguf, *self.pack.iterdir()):
            drop_from_page_cache(file)


def measure(
    request: Request, shares: Sequence[float], allowance_bytes: int,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """For each share of the experts (in place of the request's own) rounds of all contenders, in an order drawn anew.
    The limit is what dense weights and the share take, and `allowance_bytes` for keys and values and what is computed.

    Raises BudgetError where there can be no memory group or it is too small, ModelError where contenders do not agree.
    """
    with memory_group(allowance_bytes):
        pass  # refused before anything is written
    remark = busy_warning()
    routes, uses = routes_of(request)
    with files(request, routes, progress) as model:
        record_bytes = model.expert_file.stat().st_size // uses.size
        general = {
            "machine": machine(), "remark": remark, "disk_gbps": disk_gbps(model.expert_file, record_bytes),
            "threads": resolve_threads(request.threads), "n_records": uses.size,
            "record_bytes": record_bytes, "dense_bytes": model.dense_bytes(),
            "allowance_bytes": allowance_bytes, "left_out": [] if LLAMA_CPP in contenders() else [LLAMA_CPP],
        }  # fmt: skip
        measuring = (
            _of_share(replace(request, share=share), model, routes, uses, general, progress) for share in shares
        )
        return list(measuring)


def _of_share(
    request: Request, model: Files, routes: Routes, uses: npt.NDArray[np.float64], general: dict[str, Any],
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:  # fmt: skip
    """The rounds of one share, beside what holds for all of them."""
    names, order = contenders(), random.Random(SEED)
    host_experts = round(request.share * uses.size)
    limit_bytes = general["dense_bytes"] + host_experts * general["record_bytes"] + general["allowance_bytes"]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(request.rounds):
        for at, name in enumerate(order.sample(names, len(names))):
            progress(number * len(names) + at, request.rounds * len(names), f"{request.share:.0%}, {name}")
            job = Job(
                name, model.gguf if name == LLAMA_CPP else model.pack, host_experts, uses, general["threads"],
                request.prompt_tokens, request.new_tokens,
            )  # fmt: skip
            model.make_cold()
            rounds[name].append(in_group(job, limit_bytes))
    calls = calls_of(routes, uses.shape[1], request.prompt_tokens)
    check_agreement({name: found[-1] for name, found in rounds.items()}, calls)
    return general | {
        "request": asdict(request) | {"trace": str(request.trace or ""), "folder": str(request.folder)},
        "n_slots": host_experts, "limit_bytes": limit_bytes, "contenders": [_row(name, rounds[name]) for name in names],
    }  # fmt: skip


def contenders() -> list[str]:
    """Those that this machine has."""
    return [*OURS, *([LLAMA_CPP] if importlib.util.find_spec("llama_cpp") else [])]


def _row(name: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One contender: speeds and time to open with their spread, the most memory, the counters of its last round."""
    peaks = [found["peak_bytes"] for found in rounds if found["peak_bytes"] is not None]
    return {
        "name": name, **{what: spread([found[what] for found in rounds]) for what in ("prefill", "decode", "start_s")},
        "peak_bytes": max(peaks, default=None), "counters": rounds[-1].get("counters"),
    }  # fmt: skip


def in_group(job: Job, limit_bytes: int) -> dict[str, Any]:
    """What `contender.measured` finds in a process under the limit, and its peak. Raises BudgetError where the limit
    is too low for it, what the contender raises otherwise, and ModelError where it ended otherwise."""
    context = process_context()
    receiving, sending = context.Pipe(duplex=False)
    with memory_group(limit_bytes) as group:
        process = context.Process(target=contender.run, args=(job, group, sending))
        process.start()
        sending.close()
        try:
            found = receiving.recv()
        except EOFError:
            found = None
        process.join()
        peak_bytes = group.peak_bytes()
    if found is None and process.exitcode == -9:
        raise BudgetError(
            f"{job.name} was ended by the system: {size_text(limit_bytes)} are too little for it; give a larger"
            " --allowance"
        )
    if found is None:
        raise ModelError(f"{job.name} ended without a result (exit code {process.exitcode}); its error stands above")
    if isinstance(found, BudgetError):  # it saw the limit before the system did
        raise BudgetError(f"{job.name} does not fit {size_text(limit_bytes)}; give a larger --allowance ({found})")
    if isinstance(found, HybriMoEError):
        raise found
    return {**found, "peak_bytes": peak_bytes}


def process_context() -> ForkServerContext:
    """Processes that are copies of one that has imported everything: only what a model takes counts in their group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([contender.__name__, *(["llama_cpp"] if LLAMA_CPP in contenders() else [])])
    return context


def check_agreement(last: dict[str, dict[str, Any]], calls: npt.NDArray[np.float64]) -> None:
    """Raises ModelError where logits differ, or where tokens went to other experts than they should."""
    expected = last["ours"]["logits"]
    for name, found in last.items():
        logits = found["logits"]
        same = np.array_equal(logits, expected)
        cosine = float(logits @ expected / (np.linalg.norm(logits) * np.linalg.norm(expected)))
        if not (same if name in SAME_BITS else cosine >= LEAST_COSINE):
            raise ModelError(f"{name} computes something else than ours (cosine {cosine:.4f}): refusing to tell speeds")
    if not np.array_equal(last["ours"]["uses"], calls):
        raise ModelError("the model routes tokens to other experts than it was made for: refusing to tell speeds")


def calls_of(routes: Routes, n_experts: int, prompt_tokens: int) -> npt.NDArray[np.float64]:
    """float64 [layers, experts]: calls that need each, of a prompt in one call a layer and of a token a call after."""
    n_layers = routes.shape[1]
    calls = np.zeros((n_layers, n_experts))
    for layer in range(n_layers):
        calls[layer, np.unique(routes[:prompt_tokens, layer])] += 1.0
        np.add.at(calls[layer], routes[prompt_tokens:, layer].reshape(-1), 1.0)
    return calls


@contextmanager
def files(request: Request, routes: Routes, progress: Callable[[int, int, str], None]) -> Iterator[Files]:
    """The model as GGUF file and as pack in the request's folder, removed afterwards. The vocabulary is cut as the
    layers are: it would be too large a part otherwise. Raises BudgetError where the disk has no room."""
    require_room(request, copies=2)
    whole = RandomSource(request.shape, None).config
    vocab = max(whole.vocab_size * request.layers // whole.num_hidden_layers, len(routes))
    source = RandomSource(
        request.shape, request.layers, len(routes), replaced={"vocab_size": -(-vocab // BLOCK) * BLOCK}
    )
    with tempfile.TemporaryDirectory(prefix="hybrimoe-bench-", dir=request.folder) as name:
        found = Files(Path(name) / "model.gguf", Path(name) / "pack")
        source.gguf(found.gguf, progress, lambda model: play(model, routes))
        convert(found.gguf, found.pack, progress=False, expert_dtype=DTYPE, dense_dtype=DTYPE)
        for file in (found.gguf, *found.pack.iterdir()):
            _to_disk(file)  # a page that is not yet written cannot be dropped
        yield found


def play(model: Any, routes: Routes) -> None:
    """Embeds token i so that it is routed as routes[i] says, int64 [tokens, layers, top_k]."""
    embedding = model.get_input_embeddings().weight
    routers = [weight.float() for name, weight in model.named_parameters() if name.endswith("gate.weight")]
    wanted = torch.zeros(len(routes), len(routers), len(routers[0]))
    wanted.scatter_(2, torch.from_numpy(routes), 1.0)
    with torch.no_grad():
        pointing = wanted.flatten(1) @ torch.linalg.pinv(torch.cat(routers)).T  # the least embedding that all obey
        pointing *= ROUTED_RMS / pointing.square().mean(dim=1, keepdim=True).sqrt()
        embedding[: len(routes)] = pointing.to(embedding.dtype)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
