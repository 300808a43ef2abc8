"""What a second turn of a long conversation costs, by where the first one's keys and values are; beside llama.cpp.

The first turn computes a long prompt. The second adds a few tokens: while the reply's own cache still holds the first
turn, after another conversation has used that cache, and after a restart that left only the disk.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from hybrimoe.bench import rounds as harness
from hybrimoe.bench.model.contenders import LlamaCpp
from hybrimoe.bench.model.sources import CheckpointSource, RandomSource
from hybrimoe.errors import ConfigError, ModelError
from hybrimoe.machine.facts import machine

if TYPE_CHECKING:
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation import TextGenerator

Progress = Callable[[int, int, str], None]

OTHER_TOKENS = 64
"""Of the prompt of the conversation that comes between."""
SEED = 0
KEEP_S = 600.0
"""Time for what a process leaves on disk."""
FIRST = "first"
PLACES = {
    "own": "second, own cache",
    "between": "second, from memory",
    "disk": "second, from disk",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One command line of `bench long-chat`. contexts: tokens of the first turns. new_tokens: of each reply.

    folder: where the disk level lies; None for a temporary one.
    """

    model: str | None
    shape: str | None
    layers: int | None
    deployment: DeployConfig
    contexts: tuple[int, ...]
    turn_tokens: int
    new_tokens: int
    rounds: int
    folder: Path | None
    llama_cpp: bool
    gguf: str | None


@dataclass(frozen=True, slots=True)
class Asked:
    """A reply: ms to its first token and between tokens (median), prompt tokens that were not computed, of which from
    disk, and its tokens."""

    ttft_ms: float
    tbt_ms: float
    reused: int
    from_disk: int
    token_ids: list[int]


class Contender(Protocol):
    """What answers: each method measures one reply of `new_tokens` tokens."""

    name: str

    def begin(self) -> None:
        """Forget everything."""

    def first(self, prompt_ids: list[int]) -> Asked:
        """A prompt of which nothing is known."""

    def own(self, prompt_ids: list[int]) -> Asked:
        """A prompt that goes on with the conversation."""

    def between(self, prompt_ids: list[int], other_ids: list[int]) -> Asked:
        """The same, after another conversation."""

    def disk(self, prompt_ids: list[int]) -> Asked:
        """The same, after a restart: only what lies on disk is known."""

    def tiers(self) -> dict[str, int]:
        """Bytes by where keys and values lie."""

    def close(self) -> None:
        """Nothing more is asked, and nothing more is written."""


def measure(request: Request, progress: Progress) -> dict[str, Any]:
    """Times of all turns by context and contender, as plain data.

    Raises ModelError where a second turn computes what the first one did, ConfigError for llama.cpp without weights.
    """
    if request.llama_cpp and request.shape is None:
        raise ConfigError("--llama-cpp goes with --shape: of a checkpoint give its GGUF file with --gguf")
    n_tokens = max(request.contexts) + request.turn_tokens + 2 * request.new_tokens
    if request.shape is None:
        source: CheckpointSource | RandomSource = CheckpointSource(request.model)
    else:
        source = RandomSource(request.shape, request.layers, n_tokens)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="hybrimoe-", dir=request.folder)))
        model = source.hybrid(request.deployment, progress)
        stack.callback(model.hybrimoe.session.close)
        contenders = list(_contenders(request, source, model, folder, n_tokens, progress))
        for one in contenders:
            stack.callback(one.close)
        rows: list[dict[str, Any]] = []
        for number, context in enumerate(request.contexts):
            progress(number, len(request.contexts), "contexts")
            rows += _rows(request, contenders, context, source.vocab_size)
        return {
            "bench": "long-chat",
            "model": request.shape or request.model or "demo",
            "weights": "random" if request.shape else "checkpoint",
            "layers": len(model.hybrimoe.session.layer_specs()),
            "expert_dtype": model.hybrimoe.session.config.expert_dtype,
            "turn_tokens": request.turn_tokens,
            "new_tokens": request.new_tokens,
            "rounds": request.rounds,
            "machine": machine(),
            "rows": rows,
        }


def _contenders(
    request: Request, source: Any, model: Any, folder: Path, n_tokens: int, progress: Progress
) -> Iterator[Contender]:
    from hybrimoe.generation import TextGenerator

    yield Hybrid(TextGenerator(model, source.tokenizer), folder / "prefixes", request.new_tokens)
    path = request.gguf
    if request.llama_cpp:
        path = str(folder / f"{request.shape}.gguf")
        source.gguf(Path(path), progress)
    if path is not None:
        peer = LlamaCpp(path, model.hybrimoe.session.config.threads, n_tokens)
        yield LlamaTurns(peer, folder / "llama-state", request.new_tokens)


def _rows(request: Request, contenders: Sequence[Contender], context: int, vocab_size: int) -> Iterator[dict[str, Any]]:
    """Every contender's turns after a first one of `context` tokens; rounds alternate between contenders."""
    ids = _endless(vocab_size)
    prompt = list(islice(ids, context))
    texts: dict[str, list[int]] = {}
    asked: dict[tuple[str, str], list[Asked]] = {}
    for one in contenders:
        one.begin()
        first = one.first(prompt)
        asked[one.name, FIRST] = [first]
        texts[one.name] = [*prompt, *first.token_ids[:-1]]
    for number in range(request.rounds):
        order = [(place, one) for place in PLACES for one in contenders]
        shift = number % len(order)
        for place, one in order[shift:] + order[:shift]:
            text = [*texts[one.name], *islice(ids, request.turn_tokens)]
            if place == "between":
                reply = one.between(text, list(islice(ids, OTHER_TOKENS)))
            else:
                reply = one.own(text) if place == "own" else one.disk(text)
            if reply.reused < len(texts[one.name]):
                raise ModelError(
                    f"{one.name}: {PLACES[place]} computed {len(text) - reply.reused} tokens, expected"
                    f" {request.turn_tokens}: the conversation was not kept, so figures would mean nothing"
                )
            asked.setdefault((one.name, place), []).append(reply)
    for one in contenders:
        first_ms = asked[one.name, FIRST][0].ttft_ms
        for place, words in ((FIRST, FIRST), *PLACES.items()):
            yield _row(one, context, words, asked[one.name, place], first_ms)


def _row(one: Contender, context: int, turn: str, replies: Sequence[Asked], first_ms: float) -> dict[str, Any]:
    ttft = harness.spread([reply.ttft_ms for reply in replies])
    return {
        "contender": one.name,
        "context": context,
        "turn": turn,
        "ttft_ms": ttft,
        "of_first": ttft["median"] / first_ms,
        "tbt_ms": median(reply.tbt_ms for reply in replies),
        "reused": replies[-1].reused,
        "from_disk": replies[-1].from_disk,
        "tiers": one.tiers(),
        "resident_bytes": int(psutil.Process().memory_info().rss),
    }


def _endless(vocab_size: int) -> Iterator[int]:
    """Tokens that begin alike in every run."""
    import numpy as np

    drawn = np.random.default_rng(SEED).integers(3, vocab_size, 1 << 18)
    return cycle(int(token) for token in drawn)


class Hybrid:
    """A model of ours, with the prefix cache of a server and its disk level in `folder`."""

    name = "hybrimoe"

    def __init__(self, generator: TextGenerator, folder: Path, new_tokens: int) -> None:
        self._generator, self._folder, self._new_tokens = generator, folder, new_tokens
        self._tree: Any = None
        self._engine: Any = None

    def begin(self) -> None:
        """See `Contender`."""
        self._end_process()
        for file in self._folder.glob("*.kv"):
            file.unlink()
        self._start_process()

    def first(self, prompt_ids: list[int]) -> Asked:
        """See `Contender`."""
        return self._ask(prompt_ids)

    def own(self, prompt_ids: list[int]) -> Asked:
        """See `Contender`."""
        return self._ask(prompt_ids)

    def between(self, prompt_ids: list[int], other_ids: list[int]) -> Asked:
        """See `Contender`."""
        self._ask(other_ids)
        return self._ask(prompt_ids)

    def disk(self, prompt_ids: list[int]) -> Asked:
        """See `Contender`. What is written and read leaves the page cache, so the disk is read.

        A program that starts again has the memory ready before it has loaded its model.
        """
        self._end_process()
        self._start_process()
        self._tree.disk.ready.wait(KEEP_S)
        return self._ask(prompt_ids)

    def tiers(self) -> dict[str, int]:
        """See `Contender`."""
        tree = self._tree
        return {"keys and values": self._engine.kv_bytes, "prefix cache": tree.n_bytes, "disk": tree.disk.n_bytes}

    def close(self) -> None:
        """See `Contender`."""
        self._end_process()

    def _start_process(self) -> None:
        from hybrimoe.generation.continuous_batching import BatchEngine
        from hybrimoe.generation.prefix.blocks import PrefixTree
        from hybrimoe.generation.prefix.disk import DiskLevel

        most = psutil.virtual_memory().total
        self._tree = PrefixTree(self._generator.model, most, DiskLevel(self._folder, most, "bench long-chat"))
        self._engine = BatchEngine(self._generator, prefixes=self._tree)

    def _end_process(self) -> None:
        if self._tree is not None:
            self._tree.close(KEEP_S)
            self._tree = self._engine = None
            gc.collect()  # the memory of a process that has ended is free

    def _ask(self, prompt_ids: list[int]) -> Asked:
        from hybrimoe.generation import SamplingOptions

        options = SamplingOptions(temperature=0.0, max_new_tokens=self._new_tokens, ignore_eos=True)
        reply = self._engine.admit(prompt_ids, options, lambda: False)
        while self._engine.n_running:
            for progress in self._engine.step():
                if progress.error is not None:
                    raise progress.error
        times = reply.times
        tbt_ms = median(times.between_tokens_us) / 1e3
        return Asked(times.ttft_us / 1e3, tbt_ms, reply.n_reused, reply.n_read, reply.token_ids)


class LlamaTurns:
    """llama.cpp, which keeps states as llama-server does: those of its slot, a copy in memory, a saved slot."""

    name = "llama.cpp"

    def __init__(self, peer: LlamaCpp, file: Path, new_tokens: int) -> None:
        self._peer, self._llama, self._file, self._new_tokens = peer, peer.llama, file, new_tokens
        self._text: list[int] = []
        self._state: Any = None

    def begin(self) -> None:
        """See `Contender`."""
        self._llama.reset()
        self._state = None

    def first(self, prompt_ids: list[int]) -> Asked:
        """See `Contender`. The copy and the file are made afterwards, in no measured time."""
        import llama_cpp

        asked = self._ask(prompt_ids, 0)
        context = self._llama.ctx
        self._text = self._known([*prompt_ids, *asked.token_ids[:-1]])
        size = llama_cpp.llama_state_seq_get_size(context, 0)
        self._state = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(context, self._state, size, 0)
        tokens = (llama_cpp.llama_token * len(self._text))(*self._text)
        llama_cpp.llama_state_seq_save_file(context, str(self._file).encode(), 0, tokens, len(self._text))
        return asked

    def own(self, prompt_ids: list[int]) -> Asked:
        """See `Contender`."""
        return self._ask(prompt_ids, len(self._text))

    def between(self, prompt_ids: list[int], other_ids: list[int]) -> Asked:
        """See `Contender`."""
        import llama_cpp

        self._ask(other_ids, 0)
        return self._ask(
            prompt_ids, len(self._text),
            lambda: llama_cpp.llama_state_seq_set_data(self._llama.ctx, self._state, len(self._state), 0),
        )  # fmt: skip

    def disk(self, prompt_ids: list[int]) -> Asked:
        """See `Contender`. The file is read from the disk, not from the page cache."""
        import os

        import llama_cpp

        self._llama.reset()
        with self._file.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        tokens, n_read = (llama_cpp.llama_token * len(self._text))(), ctypes.c_size_t()
        return self._ask(
            prompt_ids, len(self._text),
            lambda: llama_cpp.llama_state_seq_load_file(
                self._llama.ctx, str(self._file).encode(), 0, tokens, len(tokens), ctypes.byref(n_read)
            ),
        )  # fmt: skip

    def tiers(self) -> dict[str, int]:
        """See `Contender`."""
        n_bytes = 0 if self._state is None else len(self._state)
        return {"keys and values": n_bytes, "prefix cache": n_bytes, "disk": n_bytes}

    def close(self) -> None:
        """See `Contender`."""

    def _ask(self, prompt_ids: Sequence[int], n_held: int, restore: Callable[[], Any] = lambda: None) -> Asked:
        """A reply; `restore` brings the state of `n_held` tokens back, and counts as time to the first token."""
        known = self._known(prompt_ids)
        if n_held == 0:
            self._llama.reset()
        times = [time.perf_counter()]
        restore()
        self._llama.n_tokens = n_held  # `eval` takes out of its memory what comes after
        self._llama.eval(known[n_held:])
        tokens = [self._peer.greedy()]
        times.append(time.perf_counter())
        while len(tokens) < self._new_tokens:
            self._llama.eval(tokens[-1:])
            tokens.append(self._peer.greedy())
            times.append(time.perf_counter())
        steps = [1e3 * (after - before) for before, after in pairwise(times)]
        return Asked(steps[0], median(steps[1:]), n_held, 0, tokens)

    def _known(self, prompt_ids: Sequence[int]) -> list[int]:
        return [token % self._llama.n_vocab() for token in prompt_ids]
