"""A contender in a process of its own: it joins the memory group, opens a model, computes a prompt and a reply."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe.bench.model.contenders import LlamaCpp
from hybrimoe.bench.model.sources import NoTokenizer
from hybrimoe.bench.tiers.layers import Static
from hybrimoe.bench.tiers.memory_group import MemoryGroup
from hybrimoe.checkpoint import load
from hybrimoe.errors import HybriMoEError
from hybrimoe.generation import PrefixCache, TextGenerator
from hybrimoe.runtime.tier.slots import LEAST_SLOTS
from hybrimoe.runtime.tier.store import TieredStore

DTYPE = "int4"
"""Of experts and linear layers: the values of Q4_0 as they are."""
LLAMA_CPP = "llama.cpp"

Forward = Callable[[Sequence[int]], npt.NDArray[np.float32]]
"""Computes tokens behind those before; logits [V] after the last of them."""


@dataclass(frozen=True, slots=True)
class Job:
    """name: "ours", "static", "mmap" or "llama.cpp". model: a pack, of llama.cpp a GGUF file. host_experts: of which
    ours and static hold so many in memory. uses float64 [layers, experts]: what the static set goes by. Token i of the
    prompt and the reply is i: its embedding says which experts it is routed to (`played`)."""

    name: str
    model: Path
    host_experts: int
    uses: npt.NDArray[np.float64]
    threads: int
    prompt_tokens: int
    new_tokens: int


def run(job: Job, group: MemoryGroup, answer: Connection) -> None:
    """Body of the process: what `measured` found, or the error, goes to `answer`."""
    try:
        if job.name != LLAMA_CPP:
            _warm_up(job)
        group.join()
        answer.send(measured(job))
    except HybriMoEError as error:
        answer.send(error)


def _warm_up(job: Job) -> None:
    """The demo model computes a prompt and tokens, with experts on disk where the job has them there: what is compiled
    and loaded for that is there before, so that the group is charged with what the model of the job takes."""
    model = load(
        None, accelerator="none", threads=job.threads, progress=False, expert_dtype=DTYPE, dense_dtype=DTYPE,
        **_limited(job, LEAST_SLOTS),
    )  # fmt: skip
    generator, cache = TextGenerator(model, NoTokenizer()), PrefixCache(model)
    for tokens in (range(job.prompt_tokens), [0], [0]):
        generator.forward(tokens, cache)
    model.hybrimoe.session.close()
    del model, generator, cache
    gc.collect()
    gc.freeze()  # objects that are looked through are written to, and so would be copied for this process


def measured(job: Job) -> dict[str, Any]:
    """start_s: opening the model. prefill, decode: tokens a second. logits float32 [V] at the end; of ours and static:
    counters of both phases, and uses float64 [layers, experts], calls that needed each."""
    began = time.perf_counter()
    forward, told = (_llama_cpp if job.name == LLAMA_CPP else _hybrid)(job)
    opened = time.perf_counter()
    logits = forward(range(job.prompt_tokens))
    read = time.perf_counter()
    for token in range(job.prompt_tokens, job.prompt_tokens + job.new_tokens):
        logits = forward([token])
    replied = time.perf_counter()
    return {
        "start_s": opened - began, "prefill": job.prompt_tokens / (read - opened),
        "decode": job.new_tokens / (replied - read), "logits": logits, **told(),
    }  # fmt: skip


def _limited(job: Job, host_experts: int) -> dict[str, Any]:
    """Settings of a model with so many experts in memory; none where the page cache has them all."""
    return {} if job.name == "mmap" else {"memory.host": host_experts, "memory.disk": "auto"}


def _hybrid(job: Job) -> tuple[Forward, Callable[[], dict[str, Any]]]:
    limited = _limited(job, job.host_experts)
    model = load(job.model, accelerator="none", threads=job.threads, progress=False, **limited)
    generator, cache = TextGenerator(model, NoTokenizer()), PrefixCache(model)
    session = model.hybrimoe.session
    uses = session.store.cache.uses if isinstance(session.store, TieredStore) else np.zeros(job.uses.shape)
    uses[:] = 0.0  # what the start tried does not count
    if job.name == "static":
        n_layers, n_experts = job.uses.shape
        session.store.cache.worth = Static(n_layers, n_experts, job.host_experts)
        session.store.cache.worth.keep[:] = job.uses.reshape(-1)

    def forward(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = generator.forward(tokens, cache).float().numpy()
        return logits

    def told() -> dict[str, Any]:
        counters = {phase: found.as_dict() for phase, found in session.stats().by_phase.items()}
        return {"counters": counters, "uses": uses}

    return forward, told


def _llama_cpp(job: Job) -> tuple[Forward, Callable[[], dict[str, Any]]]:
    llama = LlamaCpp(str(job.model), job.threads, job.prompt_tokens + job.new_tokens, mapped=True)
    return llama.forward, dict
