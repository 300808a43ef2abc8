"""The measurement behind `hybrimoe bench tiers`: layers of experts of which host memory holds a share.

Recorded or made routing is played through a session's real layer calls, over a packed file of random experts. All
contenders have the same memory, begin each round with nothing in it and nothing in the page cache, compute the same
prompt and then the same tokens, and give the same bits.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import ExpertSpec, ExpertWeights, pack_expert
from hybrimoe.bench.overhead import Experts
from hybrimoe.bench.rounds import busy_warning, spread
from hybrimoe.checkpoint.pack import experts as packed
from hybrimoe.checkpoint.pack.experts import PackedFile
from hybrimoe.errors import BudgetError, ConfigError, ModelError
from hybrimoe.machine.facts import machine
from hybrimoe.machine.profiles import open_shape
from hybrimoe.runtime import ExpertStore, LayerSpec, RuntimeConfig, Session
from hybrimoe.runtime.tier.disk_speed import drop_from_page_cache, measure_disk
from hybrimoe.runtime.tier.slots import RecordPlaces
from hybrimoe.runtime.tier.store import TieredStore
from hybrimoe.tracing.sources import DEFAULT_LOCALITY
from scheduler.demand import Demand
from scheduler.forecast.host_worth import Worth
from scheduler.traces.synthetic import LOCALITIES, generate
from scheduler.traces.trace import Trace

SEED = 0
WEIGHT_SCALE = 0.02
LOW, HIGH = "slowest", "fastest"

Routes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Request:
    """What is measured. share: of all experts, in host memory. trace: a file of recorded routing; None: made routing of
    the shape. folder: where the packed file is put, on the disk that is to be measured."""

    shape: str
    layers: int
    dtype: str
    share: float
    prompt_tokens: int
    new_tokens: int
    rounds: int
    trace: Path | None
    folder: Path
    threads: int | None = None


class LeastRecent(Worth):
    """Keeps what was used latest, and forecasts nothing."""

    _clock = 0.0

    def observe(self, demand: Demand) -> None:
        self._clock += 1.0
        self.keep[demand.layer * self.n_experts + demand.expert_ids] = self._clock


class Static(Worth):
    """Keeps the experts that other sequences used most; the others come for their call only (KTransformers' set)."""

    def observe(self, demand: Demand) -> None:
        return None


class MappedWithin:
    """A memory-mapped file of which at most `n_records` are resident, the latest used: what a system's page cache does
    where a program may have no more memory. A limit on a group of processes takes rights that a benchmark does not
    have, so pages that would be over it are given back after each layer, outside of the time that is measured."""

    def __init__(self, file: PackedFile, places: RecordPlaces, n_records: int) -> None:
        self.store, self._places, self._n_records = file.open(), places, n_records
        self._map = self.store.mapped.mapping
        self._used: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._descriptor = os.open(file.path, os.O_RDONLY)

    def used(self, layer: int, experts: Iterable[int]) -> None:
        """These have been computed: the least recently used ones beyond the limit leave memory."""
        for expert in experts:
            self._used[layer, expert] = None
            self._used.move_to_end((layer, expert))
        while len(self._used) > self._n_records:
            self._drop(*self._used.popitem(last=False)[0])

    def _drop(self, layer: int, expert: int) -> None:
        offset, size = self._places.record(layer, expert)
        start, end = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
        os.posix_fadvise(self._descriptor, start, end - start, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """The pages stay for whoever drops them."""
        os.close(self._descriptor)


@dataclass(slots=True)
class Bench:
    """One file, the routing that is played over it, and the hidden states."""

    request: Request
    file: PackedFile
    n_slots: int
    routes: Routes
    uses: npt.NDArray[np.float64]
    hidden: torch.Tensor

    def run(self, name: str) -> dict[str, Any]:
        """A round of one contender, cold: tokens a second of the prompt and of the reply, what was read, the output."""
        gc.collect()  # what maps the file keeps it in the page cache
        drop_from_page_cache(self.file.path)
        store, after = self._open(name)
        session = self._session(store)
        try:
            prompt_s = self._play(session, slice(0, self.request.prompt_tokens), "prefill", after)[0]
            decode_s = 0.0
            for token in range(self.request.prompt_tokens, len(self.routes)):
                took_s, output = self._play(session, slice(token, token + 1), "decode", after)
                decode_s += took_s
            stats = session.stats()
        finally:
            session.close()
        return {
            "prefill": self.request.prompt_tokens / prompt_s,
            "decode": (len(self.routes) - self.request.prompt_tokens) / decode_s,
            "counters": {phase: counters.as_dict() for phase, counters in stats.by_phase.items()},
            "output": output,
        }

    def _open(self, name: str) -> tuple[ExpertStore, Callable[[int, Iterable[int]], None]]:
        """The contender's store, and what is told after each layer which experts were used."""
        places = RecordPlaces.of(self.file.path, self.file.layers, self.file.offset_bytes)
        if name == "mmap":
            mapped = MappedWithin(self.file, places, self.n_slots)
            return mapped.store, mapped.used
        store = TieredStore(
            self.file.layers, self.file.path, self.file.offset_bytes, self.n_slots * places.slot_bytes
        )  # fmt: skip
        kinds = {"ours": Worth, "least recently used": LeastRecent, "static": Static}
        worth = kinds[name](len(places.layers), places.n_experts, self.n_slots)
        if name == "static":
            worth.keep[:] = self.uses.reshape(-1)
        store.cache.worth = worth
        return store, lambda layer, experts: None

    def _session(self, store: ExpertStore) -> Session:
        request = self.request
        session = Session(RuntimeConfig("none", expert_dtype=store.layers[0].spec.dtype, threads=request.threads))
        for layer in store.layers:
            module = Experts(layer.num_experts, layer.spec.hidden, layer.spec.inter)
            session.add_layer(layer.path, module)
        session.finalize(store=store)
        return session

    def _play(
        self, session: Session, tokens: slice, phase: str, after: Callable[[int, Iterable[int]], None]
    ) -> tuple[float, torch.Tensor]:
        """Seconds of the layer calls of some tokens, and the last layer's output."""
        hidden, routes = self.hidden[tokens], torch.from_numpy(self.routes[tokens])
        weights = torch.full(routes.shape[::2], 1.0 / routes.shape[2])
        session.announce_step(phase)
        took_s = 0.0
        for layer in range(routes.shape[1]):
            ids = routes[:, layer].contiguous()
            start_s = perf_counter()
            output = session.run_layer(layer, hidden, ids, weights)
            took_s += perf_counter() - start_s
            after(layer, np.unique(ids.numpy()).tolist())
        return took_s, output


def measure(request: Request, progress: Callable[[int, int, str], None] = lambda *_: None) -> dict[str, Any]:
    """Rounds of all contenders, in an order drawn for each; the comparison before them warms up.

    Raises ModelError where they do not give the same bits.
    """
    remark = busy_warning()
    with packed_file(request) as file:
        places = RecordPlaces.of(file.path, file.layers, file.offset_bytes)
        routes, uses = routes_of(request)
        record_bytes = file.layers[0].spec.record_bytes
        n_slots = places.slots_for(round(request.share * places.n_records) * places.slot_bytes)
        hidden = torch.randn(len(routes), file.layers[0].spec.hidden, generator=torch.Generator().manual_seed(SEED))
        bench = Bench(request, file, n_slots, routes, uses, hidden)
        names = ["ours", *(["mmap"] if can_give_back() else []), "static", "least recently used"]
        check_same_bits(bench, names)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

        order = random.Random(SEED)
        for number in range(request.rounds):
            for name in order.sample(names, len(names)):  # who follows whom changes: pages that are dropped cost later
                progress(number, request.rounds, "measuring")
                rounds[name].append(bench.run(name))
        return {
            "request": asdict(request) | {"trace": str(request.trace or ""), "folder": str(request.folder)},
            "machine": machine(), "remark": remark, "disk_gbps": disk_gbps(file.path, record_bytes),
            "n_slots": n_slots, "n_records": places.n_records, "record_bytes": record_bytes,
            "contenders": [_row(name, rounds[name]) for name in names],
        }  # fmt: skip


def _row(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One contender: speeds with their spread, and the counters of its last round."""
    return {
        "name": name, **{phase: spread([found[phase] for found in rounds]) for phase in ("prefill", "decode")},
        "counters": rounds[-1]["counters"],
    }  # fmt: skip


def check_same_bits(bench: Bench, names: Iterable[str]) -> None:
    """Raises ModelError where a contender's output is not that of the first."""
    expected: torch.Tensor | None = None
    for name in names:
        output = bench.run(name)["output"]
        if expected is not None and not torch.equal(output, expected):
            raise ModelError(f"{name} computes something else than the others: refusing to measure")
        expected = output


def routes_of(request: Request) -> tuple[Routes, npt.NDArray[np.float64]]:
    """int64 [tokens, layers, top_k] of a prompt and its reply, and the uses [layers, experts] in what follows them."""
    shape, n_tokens = open_shape(request.shape), request.prompt_tokens + request.new_tokens
    if request.trace is None:
        locality = shape.name if shape.name in LOCALITIES else DEFAULT_LOCALITY
        trace = generate(request.layers, shape.n_experts, shape.top_k, n_tokens, 2, locality=locality, recall=None)
    else:
        trace = Trace.load(request.trace)
    if (trace.n_experts, trace.top_k) != (shape.n_experts, shape.top_k) or trace.n_layers < request.layers:
        raise ConfigError(
            f"the trace has {trace.n_layers} layers of {trace.n_experts} experts, {trace.top_k} a token;"
            f" {request.shape} with {request.layers} layers needs {shape.n_experts} experts, {shape.top_k} a token"
        )
    if trace.n_tokens <= n_tokens:
        raise ConfigError(f"the trace has {trace.n_tokens} tokens, more than {n_tokens} are needed; ask for fewer")
    ids = trace.expert_ids[:, : request.layers].astype(np.int64)
    uses = np.stack([
        np.bincount(ids[n_tokens:, layer].reshape(-1), minlength=shape.n_experts) for layer in range(request.layers)
    ]).astype(np.float64)  # fmt: skip
    return ids[:n_tokens], uses


@contextmanager
def packed_file(request: Request) -> Iterator[PackedFile]:
    """A packed file of random experts in the request's folder, removed afterwards. Raises BudgetError where the disk
    has no room for it."""
    layers = require_room(request)
    with tempfile.TemporaryDirectory(prefix="hybrimoe-bench-", dir=request.folder) as folder:
        yield _written(Path(folder), layers)


def require_room(request: Request, copies: int = 1) -> tuple[LayerSpec, ...]:
    """The layers of a request, whose folder is there afterwards. Raises BudgetError where the disk has no room for so
    many copies of their experts."""
    shape = open_shape(request.shape)
    spec = ExpertSpec(shape.hidden, shape.inter, request.dtype)  # type: ignore[arg-type]
    layers = tuple(LayerSpec(f"layers.{index}.experts", spec, shape.n_experts) for index in range(request.layers))
    n_bytes = copies * sum(layer.nbytes for layer in layers)
    request.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(request.folder).free
    if free < n_bytes:
        raise BudgetError(
            f"{request.folder} has {free / 2**30:.1f} GiB free, the experts take {n_bytes / 2**30:.1f} GiB:"
            " fewer --layers"
        )
    return layers


def _written(folder: Path, layers: tuple[LayerSpec, ...]) -> PackedFile:
    """The file; nothing of it stays mapped, which would keep it in the page cache."""
    header = packed.describe(layers, [])
    with packed.fill(folder, layers, header) as store:
        _write_random(store)
    found = packed.find([folder], layers, header)
    assert found is not None
    return found


def _write_random(store: ExpertStore) -> None:
    """One expert of each layer is really drawn, the others are copies: values do not matter, bytes do."""
    generator = torch.Generator().manual_seed(SEED)
    for index, layer in enumerate(store.layers):
        spec = layer.spec
        matrix = partial(torch.randn, generator=generator)
        weights = ExpertWeights(
            up=matrix(spec.inter, spec.hidden) * WEIGHT_SCALE, down=matrix(spec.hidden, spec.inter) * WEIGHT_SCALE,
            gate=matrix(spec.inter, spec.hidden) * WEIGHT_SCALE,
        )  # fmt: skip
        pack_expert(spec, weights, store.record(index, 0))
        for expert in range(1, layer.num_experts):
            store.record(index, expert)[:] = store.record(index, 0)


def can_give_back() -> bool:
    """Whether this system lets a program give pages of a mapped file back, as `MappedWithin` does."""
    return hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fadvise")


def disk_gbps(path: Path, record_bytes: int) -> float:
    """1e9 bytes/s at which the file is read, cold, record by record as a host cache does."""
    found = measure_disk(path, record_bytes, rounds=1)
    return found.profile().gbps
