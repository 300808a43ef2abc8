"""A compiled step (or some of its layers): builds the program, binds it to KV caches, runs it on rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cpu_kernels.engine.call import LINE
from cpu_kernels.errors import ActivationValueError, LayoutError
from cpu_kernels.simd.attention import CHUNK
from cpu_kernels.step import attend, index
from cpu_kernels.step.emit import CacheCalls, Emitter
from cpu_kernels.step.parts import Layer, Model, StateLayer
from cpu_kernels.step.program import (
    MASK,
    MASK_ROW,
    MAX_LOGITS,
    MAX_ROWS,
    N_ROWS,
    NOT_FINITE,
    PADDING,
    POSITION,
    SEEN,
    SEQUENCE,
    TOKEN,
    Part,
    Program,
)
from cpu_kernels.step.run import perform
from cpu_kernels.step.stream import add_embedding

ROOM_BYTES = 64 << 20
"""What the intermediate results of attention may take for the rows of a prompt; those of MAX_LOGITS rows always may."""


@dataclass(frozen=True, slots=True)
class CachePlace:
    """Where a sequence's keys and values lie in a layer: addresses, and the bytes from one head and token to the next.

    kind: how they are stored, one of `stored.KIND_OF`. first: number of the first token that is held (earlier ones are
    gone). index: of a layer with an index, the address of its keys, the bytes from one token to the next, and how they
    are stored.
    """

    keys: tuple[int, int, int]
    values: tuple[int, int, int]
    kind: int
    first: int = 0
    index: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class StatePlace:
    """Where a sequence's states in a layer lie: of its last inputs and of its matrices the addresses at which they are
    read and written, and how they are stored (`floats`); 0: the layer has none."""

    inputs: tuple[int, int, int] = (0, 0, 0)
    matrices: tuple[int, int, int] = (0, 0, 0)


@dataclass(slots=True)
class Workspace:
    """What compiled layers write while they run: buffers of rows, and room for the runs of attention.

    Layers that run one at a time may share it.
    """

    buffers: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    room: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))


class CompiledLayers:
    """Some layers in one compiled call; their input and output is the stream, float32 [MAX_ROWS, width].

    A whole model (`CompiledStep`) begins with token ids and ends with logits instead.
    """

    def __init__(
        self, layers: Sequence[tuple[int, Layer]], width: int, ropes: tuple[int, ...], n_threads: int, isa_name: str,
        workspace: Workspace | None = None,
    ) -> None:  # fmt: skip
        self._workspace = workspace or Workspace()
        self.program = Program(n_threads, self._workspace.buffers)
        self._emitter = Emitter(self.program, width, isa_name, ropes)
        self._isa_name = isa_name
        self._begin()
        for number, layer in layers:
            self._emitter.layer(number, layer)
        self._end()
        self.program.seal()
        self.width = width
        self._caches = self._emitter.caches
        self.cache_layers = tuple(calls.layer for calls in self._caches)
        """Number of the cache layer of each attention, in order."""
        self.index_layers = tuple(calls.layer for calls in self._caches if calls.index is not None)
        """The same of those with an index."""
        self.state_layers = tuple(calls.layer for calls in self._emitter.states)
        """The same of each layer that keeps states."""
        self._room = self._workspace.room
        self._room_for = (0, 0)  # rows, tokens
        self._array = {"stream": _floats(self._emitter.stream, width)}
        self.angles = [
            (_floats(cos, n), _floats(sin, n)) for n, (cos, sin) in zip(ropes, self._emitter.angles, strict=True)
        ]

    def _begin(self) -> None:
        """What comes before the layers."""

    def _end(self) -> None:
        """What comes after the layers."""
        self._emitter.close()

    @property
    def stream(self) -> np.ndarray:
        """float32 [MAX_ROWS, width]: set before a run, read after it."""
        return self._array["stream"]

    def chosen(self, top_k: int) -> np.ndarray:
        """int32 [MAX_ROWS, top_k]: the tokens that the last index with as many has chosen, of rows that see more; where
        the layers have none, set before a run."""
        return _floats(self.program.floats("chosen", top_k), top_k).view(np.int32)

    def scores(self, number: int) -> np.ndarray:
        """float32 [MAX_ROWS, tokens]: what the index of attention `number` gave tokens in the last run, of rows that
        see more than are chosen."""
        call = self._caches[number].index
        assert call is not None
        return _floats(int(call[index.SCORES]), int(call[index.MAX_TOKENS]))

    @property
    def experts_activated(self) -> dict[int, int]:
        """Activated experts of each layer with experts, over all runs so far."""
        return {layer: int(count[0]) for layer, count in self._emitter.active.items()}

    @property
    def ticks(self) -> dict[Part, int]:
        """Clock ticks spent on each part, over all runs so far."""
        return {part: int(self.program.ticks[part]) for part in Part}

    def bind(self, number: int, sequence: int, place: CachePlace) -> None:
        """Lets attention `number` read and write the cache of a step's sequence at `place`."""
        calls = self._caches[number]
        calls.places[sequence] = (*place.keys, *place.values, place.kind, place.first, *place.index)
        attend.set_kernels(calls.attend, place.kind, self._isa_name)
        if calls.index is not None:
            index.set_index_kernel(calls.index, place.index[2], self._isa_name)

    def bind_states(self, number: int, sequence: int, place: StatePlace) -> None:
        """Lets the layer with states `number` read and write those of a step's sequence at `place`."""
        self._emitter.states[number].places[sequence] = (*place.inputs, *place.matrices)

    def prepare(self, kind: int, layers: Sequence[int]) -> None:
        """Compiles (or loads) now what attention in `layers` of the cache needs to read rows that are stored as `kind`.

        Raises LayoutError where heads cannot be stored so.
        """
        for calls in self._caches:
            if calls.layer in layers:
                attend.set_kernels(calls.attend, kind, self._isa_name)

    def give_room(self, n_rows: int, n_tokens: int) -> None:
        """Makes room for the intermediate results of attention of n_rows rows over up to `n_tokens` cached tokens."""
        known_rows, known_tokens = self._room_for
        if n_rows <= known_rows and n_tokens <= known_tokens and self._room is self._workspace.room:
            return
        if n_tokens > known_tokens:
            n_tokens = -(-n_tokens * 5 // 4 // CHUNK) * CHUNK
        n_tokens = max(n_tokens, known_tokens)
        sizes = [_room_bytes(calls, n_rows, n_tokens) for calls in self._caches]
        parts, stats, scores = (max((size[part] for size in sizes), default=0) for part in range(3))
        if parts + stats + scores + LINE > self._workspace.room.size:
            self._workspace.room = np.empty(parts + stats + scores + LINE, np.uint8)
        self._room, self._room_for = self._workspace.room, (n_rows, n_tokens)
        start = int(self._room.ctypes.data) + -int(self._room.ctypes.data) % LINE
        for calls in self._caches:
            attend.give_room(calls.attend, start, start + parts, n_tokens)
            if calls.index is not None:
                index.give_scores(calls.index, start + parts + stats, n_tokens)

    def most_rows(self, n_tokens: int) -> int:
        """Rows of a run over up to `n_tokens` cached tokens whose intermediate results take at most ROOM_BYTES."""
        row_bytes = max((sum(_room_bytes(calls, 1, n_tokens)) for calls in self._caches), default=0)
        return max(MAX_LOGITS, min(MAX_ROWS, ROOM_BYTES // max(1, row_bytes)))

    def set_rows(
        self, n_past: Sequence[int], n_new: int, tokens: Sequence[int] = (), n_logits: int = 0,
        positions: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """The rows of the next run: n_new tokens of each sequence, sequence by sequence, behind its n_past cached ones.

        n_logits: of one sequence, how many of its last rows get logits; 0: as many as there can be. positions: where
        the rows stand; none given: behind the cached tokens.
        Raises LayoutError for more rows than a step has, or rows with logits.
        """
        n_rows = len(n_past) * n_new
        n_logits = n_logits or min(n_rows, MAX_LOGITS)
        if not 0 < n_rows <= MAX_ROWS:
            raise LayoutError(f"a compiled step takes 1 to {MAX_ROWS} rows, found {len(n_past)} x {n_new}")
        if n_logits > min(n_rows, MAX_LOGITS):
            raise LayoutError(f"a compiled step gives up to {MAX_LOGITS} logits, found {n_logits} of {n_rows} rows")
        rows = self.program.rows
        for row in range(n_rows):
            sequence, number = divmod(row, n_new)
            rows[row, SEQUENCE], rows[row, SEEN], rows[row, PADDING] = sequence, n_past[sequence] + number + 1, 0
        rows[:n_rows, POSITION] = positions or rows[:n_rows, SEEN] - 1
        if tokens:
            rows[:n_rows, TOKEN] = tokens
        self._emitter.set_rows(n_rows, n_logits)

    def set_mask(self, mask: np.ndarray | None) -> None:
        """float32 [sequences, tokens] that is added to all scores of the next run, at least LOWEST; None: nothing.

        Called after `set_rows`. The array is read where it lies: it must stay until the run has ended.
        """
        if mask is not None:
            rows = self.program.rows[: self.program.state[N_ROWS]]
            rows[:, PADDING] = (mask == 0).argmax(1)[rows[:, SEQUENCE]]
        self.program.state[MASK] = 0 if mask is None else mask.ctypes.data
        self.program.state[MASK_ROW] = 0 if mask is None else mask.shape[1]

    def run(self) -> None:
        """Performs the operations on the rows. Raises ActivationValueError where a hidden state is not finite."""
        states = (self.program.state, self.program.head_state)
        for state in states:
            state[NOT_FINITE] = 0
        perform(self.program)
        found = max(int(state[NOT_FINITE]) for state in states)
        if found:
            raise ActivationValueError(
                f"layer {found - 1}: a hidden state before its products is NaN or infinite; the error "
                "lies in this layer or before it: a damaged weight, or NaN in the KV cache of the conversation"
            )


def _room_bytes(calls: CacheCalls, n_rows: int, n_tokens: int) -> tuple[int, int, int]:
    """Bytes of (results, statistics, scores of the index) of attention."""
    scores = 0 if calls.index is None else index.scores_bytes(calls.index, n_rows, n_tokens)
    return (*attend.room_bytes(calls.attend, n_rows, n_tokens), scores)


class CompiledStep(CompiledLayers):
    """A whole model: token ids in, logits out."""

    def __init__(self, model: Model, n_threads: int, isa_name: str) -> None:
        self._model = model
        super().__init__(list(enumerate(model.layers)), model.embedding.width, model.ropes, n_threads, isa_name)
        self._array["logits"] = _floats(self._logits, model.head.output.n_out, MAX_LOGITS)

    def _begin(self) -> None:
        add_embedding(self.program, self._model.embedding, self._emitter.stream)

    def _end(self) -> None:
        self._logits = self._emitter.head(self._model.head)

    @property
    def logits(self) -> np.ndarray:
        """float32 [MAX_LOGITS, vocabulary] of the last run's rows that have some."""
        return self._array["logits"]


class CompiledStates:
    """What a layer with states computes between its projections and the last one, of up to MAX_ROWS rows a call."""

    def __init__(self, core: StateLayer, n_threads: int, isa_name: str, workspace: Workspace) -> None:
        self.program = Program(n_threads, workspace.buffers)
        self._emitter = Emitter(self.program, core.output.n_out, isa_name, ())
        outs = self._emitter.projections(core)
        result = self._emitter.recall(core, outs)
        self.program.seal()
        self.inputs = [_floats(out, product.n_out) for out, product in zip(outs, core.projections, strict=True)]
        """float32 [MAX_ROWS, columns] of each projection: set before a run."""
        self.result = _floats(result, core.output.n_in)
        """float32 [MAX_ROWS, columns]: read after it."""

    def bind(self, sequence: int, place: StatePlace) -> None:
        """Lets the next runs read and write the states of a sequence at `place`."""
        self._emitter.states[0].places[sequence] = (*place.inputs, *place.matrices)

    def run(self, n_sequences: int, n_new: int) -> None:
        """The next n_new tokens of each sequence, sequence by sequence. Raises LayoutError for too many rows."""
        n_rows = n_sequences * n_new
        if not 0 < n_rows <= MAX_ROWS:
            raise LayoutError(f"compiled states take 1 to {MAX_ROWS} rows, found {n_sequences} x {n_new}")
        rows = self.program.rows
        rows[:n_rows, SEQUENCE] = np.repeat(np.arange(n_sequences), n_new)
        self._emitter.set_rows(n_rows, 1)
        perform(self.program)


def _floats(address: int, width: int, n_rows: int = MAX_ROWS) -> np.ndarray:
    """float32 [n_rows, width] at an address of the program."""
    import ctypes

    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, shape=(n_rows, width))
