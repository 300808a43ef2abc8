"""Channels: columns of projections, each token's joined with those of the tokens before it by a convolution over time.

One task is a unit of neighbouring channels of one sequence, for all its tokens in their order::

    x = source, times `before`                      where there is one
    y[t] = sum over taps i of weight[i] * x[t - taps + 1 + i] + bias        without taps: x
    y = silu(y)                                     if asked
    y = scale * y / sqrt(sum of y ** 2 + eps)       over the unit, if asked
    out = y, times `after`                          where there is one

The last inputs of each channel are the sequence's state, [channels, taps] with the newest last, as transformers keeps
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpu_kernels.errors import LayoutError
from cpu_kernels.jit.compiled import Whole, Worker, inline_kernel
from cpu_kernels.jit.primitives import floats_at, halves_at, int64s_at, take_ticket
from cpu_kernels.step.cached import rows_of
from cpu_kernels.step.floats import FLOAT32, bits_of, copy, fill, float_of, from_half, silu, square_sum, to_half
from cpu_kernels.step.program import N_ROWS, SCRATCH, SCRATCH_BYTES, STATE_SIZE, Part, Program
from cpu_kernels.step.states.held import INPUTS, INPUTS_KIND, NEW_INPUTS, n_sequences, states_of

(STATE, NEXT, N_CHANNELS, TAPS, WEIGHT, BIAS, SILU, N_UNITS, UNITS, OUT, PLACES, CHANNELS_CALL) = range(12)
# A unit: where its columns lie and those that they are multiplied with before and after (0: none), floats from one row
# to the next; its first channel and how many it has; eps and scale of its norm as their bits (eps 0: no norm).
SOURCE, BEFORE, AFTER, SOURCE_ROW, CHANNEL, COUNT, EPS, SCALE, UNIT_SIZE = range(9)
UNIT_CHANNELS = 256
"""Channels of a unit that has no norm, at most."""
ROOM_FLOATS = SCRATCH_BYTES // 4


@dataclass(frozen=True, slots=True)
class Unit:
    """n neighbouring channels from `source` float32 rows, `row` floats apart; what they are multiplied with (0: with
    nothing); eps of their norm (0: none) and the scale behind it."""

    n: int
    source: int
    row: int
    before: int = 0
    after: int = 0
    eps: float = 0.0
    scale: float = 1.0


def _channels(call_address: int, thread: int) -> None:
    """Worker. Task: a unit of a sequence."""
    call = int64s_at(call_address, CHANNELS_CALL)
    state = int64s_at(call[STATE], STATE_SIZE)
    rows = rows_of(state)
    n_units, count = call[N_UNITS], n_sequences(state, rows)
    n_new = state[N_ROWS] // count
    room = state[SCRATCH] + thread * SCRATCH_BYTES
    while True:
        task = take_ticket(call[NEXT])
        if task >= count * n_units:
            return
        unit = int64s_at(call[UNITS] + 8 * UNIT_SIZE * (task % n_units), UNIT_SIZE)
        sequence = task // n_units
        if call[TAPS]:
            _convolve(call, unit, states_of(call[PLACES], sequence), sequence * n_new, n_new, room)
        else:
            for row in range(sequence * n_new, (sequence + 1) * n_new):
                out = _out(call, unit, row)
                _read(unit, row, out)
                _finish(call, unit, row, out)


@inline_kernel
def _convolve(call: np.ndarray, unit: np.ndarray, place: np.ndarray, first: Whole, n_new: Whole, room: Whole) -> None:
    """All rows of a sequence, from `first` on. room: for [TAPS, COUNT] inputs, of which the oldest is at `oldest`."""
    taps, n, channel = call[TAPS], unit[COUNT], unit[CHANNEL]
    _load(place[INPUTS_KIND], place[INPUTS], channel, taps, n, room)
    oldest = 0
    for row in range(first, first + n_new):
        _read(unit, row, floats_at(room + 4 * oldest * n, n))
        oldest = (oldest + 1) % taps
        out = _out(call, unit, row)
        if call[BIAS]:
            copy(floats_at(call[BIAS] + 4 * channel, n), out)
        else:
            fill(out, np.float32(0))
        for tap in range(taps):
            weight = floats_at(call[WEIGHT] + 4 * (tap * call[N_CHANNELS] + channel), n)
            values = floats_at(room + 4 * ((oldest + tap) % taps) * n, n)
            for i in range(n):
                out[i] += weight[i] * values[i]
        _finish(call, unit, row, out)
    _store(place[INPUTS_KIND], place[NEW_INPUTS], channel, taps, n, room, oldest)


@inline_kernel
def _load(kind: Whole, source: Whole, channel: Whole, taps: Whole, n: Whole, room: Whole) -> None:
    """room [taps, n] = what is stored at `source` [channels, taps] for n channels."""
    values = floats_at(room, taps * n)
    if kind == FLOAT32:
        floats = floats_at(source + 4 * channel * taps, n * taps)
        for tap in range(taps):
            for i in range(n):
                values[tap * n + i] = floats[i * taps + tap]
    else:
        halves = halves_at(source + 2 * channel * taps, n * taps)
        for tap in range(taps):
            for i in range(n):
                values[tap * n + i] = from_half(halves[i * taps + tap])


@inline_kernel
def _store(kind: Whole, target: Whole, channel: Whole, taps: Whole, n: Whole, room: Whole, oldest: Whole) -> None:
    """The opposite of `_load`, of a room that begins at `oldest`."""
    values = floats_at(room, taps * n)
    if kind == FLOAT32:
        floats = floats_at(target + 4 * channel * taps, n * taps)
        for tap in range(taps):
            begin = (oldest + tap) % taps * n
            for i in range(n):
                floats[i * taps + tap] = values[begin + i]
    else:
        halves = halves_at(target + 2 * channel * taps, n * taps)
        for tap in range(taps):
            begin = (oldest + tap) % taps * n
            for i in range(n):
                halves[i * taps + tap] = to_half(values[begin + i])


@inline_kernel
def _out(call: np.ndarray, unit: np.ndarray, row: Whole) -> np.ndarray:
    return floats_at(call[OUT] + 4 * (row * call[N_CHANNELS] + unit[CHANNEL]), unit[COUNT])


@inline_kernel
def _read(unit: np.ndarray, row: Whole, values: np.ndarray) -> None:
    """values = the unit's columns of a row, times what stands before them."""
    at = 4 * row * unit[SOURCE_ROW]
    copy(floats_at(unit[SOURCE] + at, unit[COUNT]), values)
    if unit[BEFORE]:
        _multiply(values, floats_at(unit[BEFORE] + at, unit[COUNT]))


@inline_kernel
def _finish(call: np.ndarray, unit: np.ndarray, row: Whole, values: np.ndarray) -> None:
    """Activation, norm and what they are multiplied with."""
    if call[SILU]:
        for i in range(values.size):
            values[i] = silu(values[i])
    if unit[EPS]:
        factor = float_of(unit[SCALE]) / np.sqrt(square_sum(values) + float_of(unit[EPS]))
        for i in range(values.size):
            values[i] *= factor
    if unit[AFTER]:
        _multiply(values, floats_at(unit[AFTER] + 4 * row * unit[SOURCE_ROW], unit[COUNT]))


@inline_kernel
def _multiply(values: np.ndarray, factors: np.ndarray) -> None:
    for i in range(values.size):
        values[i] *= factors[i]


CHANNELS_WORK = Worker(_channels)


def add_channels(
    program: Program, units: Sequence[Unit], out: int, places: int, *, weight: np.ndarray | None = None,
    bias: np.ndarray | None = None, has_silu: bool = False,
) -> None:  # fmt: skip
    """Adds out float32 [rows, channels] from units, whose channels follow each other.

    weight float32 [channels, taps], bias float32 [channels]: of the convolution; None: there is none. places: address
    of the table that says where the sequences' last inputs lie. Raises LayoutError where a unit does not fit a thread's
    scratch.
    """
    call = program.zeros(CHANNELS_CALL, np.int64)
    parts = [part for unit in units for part in _parts(unit)]
    taps = 0 if weight is None else weight.shape[1]
    if max(part.n for part in parts) * max(1, taps) > ROOM_FLOATS:
        raise LayoutError(f"units of up to {ROOM_FLOATS // max(1, taps)} channels, found {max(p.n for p in parts)}")
    firsts = np.cumsum([0, *(part.n for part in parts)])
    table = np.array(
        [
            [p.source, p.before, p.after, p.row, first, p.n, bits_of(p.eps) if p.eps else 0, bits_of(p.scale)]
            for p, first in zip(parts, firsts[:-1], strict=True)
        ],
        np.int64,
    )
    call[[STATE, N_CHANNELS, TAPS, SILU]] = program.state.ctypes.data, firsts[-1], taps, has_silu
    call[[N_UNITS, UNITS, OUT, PLACES]] = len(parts), program.keep(table), out, places
    if weight is not None:
        call[WEIGHT] = program.keep(np.ascontiguousarray(weight.T, np.float32))
    if bias is not None:
        call[BIAS] = program.keep(np.ascontiguousarray(bias, np.float32))
    program.count(call, NEXT)
    program.add(CHANNELS_WORK, call, Part.ATTENTION)


def _parts(unit: Unit) -> list[Unit]:
    """The unit, or where it has no norm parts of UNIT_CHANNELS at most."""
    if unit.eps or unit.n <= UNIT_CHANNELS:
        return [unit]
    return [
        Unit(
            min(UNIT_CHANNELS, unit.n - first), unit.source + 4 * first, unit.row,
            unit.before + 4 * first if unit.before else 0, unit.after + 4 * first if unit.after else 0,
        )
        for first in range(0, unit.n, UNIT_CHANNELS)
    ]  # fmt: skip
