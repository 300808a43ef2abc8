"""Writes docs/gpu-counted.md: what the expert kernels could reach on cards that are not here, by counting.

    python benchmarks/gpu_counted.py           # needs Triton, no card; takes a minute

Each kernel is compiled for each card's architecture, and the machine's instructions, registers and loads are counted. A
kernel reads at the least of three rates: the card's own; that at which its loads under way fill the time of one load
(Little's law); and that at which the card's units can run its instructions. What a call takes on top (launches, and the
first loads of each kernel, which nothing overlaps) is added. Nothing here was measured, but for the rows of the H200
that stand beside what was counted for it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cpu_kernels import ExpertDtype, ExpertSpec
from cpu_kernels.format.layout import block_bytes, is_quantised
from gpu_kernels.triton import ahead
from gpu_kernels.triton.attention import keys_at_once, splits_for
from gpu_kernels.triton.cuts import Cut, Cuts, candidates

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "gpu-counted.md"
LOAD_US = 0.8
"""Assumed, from a load's issue to its data while memory is busy: about twice what is published for an idle memory."""
LAUNCH_US = 0.95
"""From one kernel of a graph to the next: (64.67 - 8.55) / 59 us, measured on an H200 (docs/gpu-measured.md)."""
NEAR_US = 0.3
"""Assumed, from an atomic or a load to its data where the second-level cache has it and memory is busy: about twice
what is published for an idle one."""
TICKET_TRIPS = 2
"""To that cache, one after the other, before a program of the kernel of one launch asks for its first lines: its
ticket, and where the record lies."""
HAND_OVER_TRIPS = 3
"""Behind the last program of up: its count, the look that sees it, the activations. Weights of down are there by then,
but those that no register had room for."""
FIRST_LOADS = 2
"""Loads of a kernel that wait for each other before its loop runs: where the record lies, its first lines."""
THREADS = 32
"""Of a warp."""
FILE_REGISTERS, REGISTER_UNIT = 65536, 256
"""Of a multiprocessor; they are given to warps by so many."""
GOAL = 0.7
"""Of the card's read rate."""


@dataclass(frozen=True, slots=True)
class Card:
    """From data sheets: architecture (80 for compute capability 8.0), multiprocessors, boost clock, memory's rate. From
    the programming guide, of a multiprocessor: warps, programs and KiB of shared memory at once, float operations a
    clock."""

    name: str
    arch: int
    multiprocessors: int
    ghz: float
    gbps: float
    warps: int
    programs: int
    shared_kib: int
    floats: int


CARDS = (
    Card("A100 80 GB", 80, 108, 1.41, 2039, 64, 32, 164, 64),
    Card("RTX 3090", 86, 82, 1.695, 936, 48, 16, 100, 128),
    Card("RTX 4090", 89, 128, 2.52, 1008, 48, 24, 100, 128),
    Card("H100 SXM", 90, 132, 1.98, 3350, 64, 32, 228, 128),
    Card("RTX 5090", 120, 170, 2.407, 1792, 48, 24, 100, 128),
)
H200 = Card("H200", 90, 132, 1.98, 4120, 64, 32, 228, 128)
"""With the rate that a sum over its memory reached there, as which the measured shares are told."""
INTEGERS = 64
"""Integer and logical operations a clock of a multiprocessor."""
LINE_BYTES_A_CLOCK = 128
"""That its first-level cache gives."""
SHAPES = {"olmoe": (2048, 1024, 8), "qwen3-30b": (2048, 768, 8), "mixtral": (4096, 14336, 2)}
DTYPES: tuple[ExpertDtype, ...] = ("int4", "int8", "bfloat16")
MEASURED: dict[tuple[str, int, int], tuple[float, float, float]] = {
    ("olmoe", 8, 1): (13.0, 19.4, 29.8), ("olmoe", 2, 1): (7.2, 9.4, 13.0), ("olmoe", 1, 1): (6.7, 8.1, 11.4),
    ("olmoe", 8, 4): (17.2, 25.3, 38.7), ("qwen3-30b", 8, 1): (11.5, 15.9, 25.1),
    ("mixtral", 2, 1): (61.1, 104.5, 188.0),
}  # fmt: skip
"""us on an H200 by shape, experts and tokens, for each dtype (docs/gpu-measured.md, "Expert kernels")."""


@dataclass(frozen=True, slots=True)
class Code:
    """What the assembler made of a kernel: warp instructions of the loop and of all else, by the unit that runs them,
    and a thread's registers."""

    loop: dict[str, int]
    once: dict[str, int]
    registers: int
    shared_bytes: int
    wide_loads: int
    """Of 16 bytes, in the loop."""


@dataclass(frozen=True, slots=True)
class Counted:
    """One kernel of a call on a card. n_bytes: of records; gbps: by what limits; us: with its first loads."""

    n_bytes: int
    under_way: float
    gbps: float
    limit: str
    us: float


def counts_of(lines: Iterable[str]) -> dict[str, int]:
    """Instructions by unit: "float", "load" and "integer" with all others; "all" is their sum."""
    counts = {"float": 0, "integer": 0, "load": 0}
    for line in lines:
        found = re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line)
        if found:
            name = found[1]
            if name in ("HMMA", "HGMMA", "QGMMA"):
                continue  # tensor cores have time of their own
            unit = "float" if name in ("FFMA", "FADD", "FMUL", "FMNMX") else "integer"
            counts["load" if name in ("LDG", "LDS", "STG", "STS", "LDGSTS", "SHFL") else unit] += 1
    return counts | {"all": sum(counts.values())}


@functools.cache
def codes(arch: int, spec: ExpertSpec, block: int) -> tuple[Code, ...]:
    """Of up and down, cut by default."""
    found = []
    for made in ahead.compiled(("cuda", arch, THREADS), spec, block):
        lines = ahead.assembly(made.asm["cubin"])
        loop = ahead.loop_of(lines)
        within, whole = counts_of(loop), counts_of(lines)
        used = ahead.resources(made.asm["cubin"])
        once = {unit: whole[unit] - within[unit] for unit in whole}
        wide = sum("LDG" in line and ".128" in line for line in loop)
        found.append(Code(within, once, used["REG"], used["SHARED"], wide))
    return tuple(found)


@functools.cache
def single_code(arch: int, spec: ExpertSpec, number: int) -> tuple[Code, Code]:
    """Of up and down of the kernel of one launch, cut as the candidate of that number. What is outside of both loops
    counts for both: a program runs a part of it."""
    (made,) = ahead.compiled(("cuda", arch, THREADS), spec, 1, number)
    lines, used = ahead.assembly(made.asm["cubin"]), ahead.resources(made.asm["cubin"])
    wide = [loop for loop in ahead.loops_of(lines) if sum("LDG" in line and ".128" in line for line in loop)]
    wide = [loop for loop in wide if not any("STG" in line for line in loop)]  # that is the rounding of the input
    up, down = sorted(wide, key=len, reverse=True)[:2]
    whole, outside = counts_of(lines), {}
    for unit in whole:
        outside[unit] = whole[unit] - counts_of(up)[unit] - counts_of(down)[unit]
    found = [
        Code(counts_of(loop), outside, used["REG"], used["SHARED"], sum(".128" in line for line in loop))
        for loop in (up, down)
    ]
    return found[0], found[1]


def singles_on(card: Card, spec: ExpertSpec) -> list[int]:
    """Numbers of the candidates of one launch."""
    every = candidates(spec.dtype, 1, divmod(card.arch, 10))
    return [number for number, cuts in enumerate(every) if cuts.single]


def programs_at_once(card: Card, code: Code, warps: int) -> int:
    """Of one multiprocessor."""
    registers = -(-code.registers * THREADS // REGISTER_UNIT) * REGISTER_UNIT * warps
    by_shared = (card.shared_kib << 10) // max(code.shared_bytes, 1024)
    return min(FILE_REGISTERS // registers, card.warps // warps, card.programs, by_shared)


def kernel(
    card: Card, code: Code, cut: Cut, n_programs: int, program_bytes: int, turn_bytes: int, steps: int
) -> Counted:
    """A kernel of `n_programs` programs that each read `program_bytes` in `steps` turns of the loop, of which one's
    `turn_bytes` are under way."""
    n_bytes = n_programs * program_bytes
    at_once = min(n_programs, programs_at_once(card, code, cut.warps) * card.multiprocessors)
    under_way = at_once * min(turn_bytes, program_bytes)
    warps = -(-n_programs // card.multiprocessors) * cut.warps
    clocks = warps * sum(
        times * max(counts["all"] / 4, counts["integer"] * THREADS / INTEGERS, counts["float"] * THREADS / card.floats)
        for times, counts in ((steps, code.loop), (1, code.once))
    )
    rates = {
        "memory": card.gbps,
        "loads under way": under_way / LOAD_US / 1e3,
        "instructions": n_bytes / (clocks / card.ghz),
    }  # fmt: skip
    limit = min(rates, key=rates.__getitem__)
    return Counted(
        n_bytes, under_way / card.multiprocessors, rates[limit], limit,
        n_bytes / (rates[limit] * 1e3) + FIRST_LOADS * LOAD_US,
    )  # fmt: skip


def counted(card: Card, spec: ExpertSpec, experts: int, tokens: int) -> tuple[Counted, Counted]:
    """Up and down of a call of `experts` experts with so many tokens each."""
    block = 1 if tokens == 1 else 4
    return _counted(card, spec, experts, ahead.cuts_on(("cuda", card.arch, THREADS), spec, block),
                    codes(card.arch, spec, block))  # fmt: skip


def counted_in_one(card: Card, spec: ExpertSpec, experts: int, number: int) -> tuple[Counted, Counted]:
    """Both parts of the kernel of one launch for a token an expert, as if one followed the other."""
    cuts = ahead.cuts_on(("cuda", card.arch, THREADS), spec, 1, number)
    return _counted(card, spec, experts, cuts, single_code(card.arch, spec, number))


def single_us(kernels: tuple[Counted, Counted]) -> float:
    """A call's time in one launch."""
    loops = sum(each.n_bytes / (each.gbps * 1e3) for each in kernels)
    return LAUNCH_US + TICKET_TRIPS * NEAR_US + LOAD_US + loops + HAND_OVER_TRIPS * NEAR_US


def _counted(card: Card, spec: ExpertSpec, experts: int, cuts: Cuts, made: tuple[Code, ...]) -> tuple[Counted, Counted]:
    up, down = made
    layout, size, quantised = spec.layout, block_bytes(spec.dtype), is_quantised(spec.dtype)
    block_lines = 0 if quantised else (32 if spec.dtype == "bfloat16" else 64)

    def one(code: Code, cut: Cut, n_programs: int, rows: int, columns: int) -> Counted:
        blocks = columns // 64
        program_bytes = rows // 16 * blocks * size
        steps = -(-2 * blocks // cut.units) if quantised else -(-blocks * block_lines // (4 * cut.units))
        return kernel(card, code, cut, n_programs, program_bytes, program_bytes // steps, steps)

    rows = 64 if spec.activation.gated else 32
    return (
        one(up, cuts.up, experts * layout.inter_padded // 32, rows, layout.hidden_padded),
        one(down, cuts.down, experts * layout.hidden_padded // cuts.down.rows, cuts.down.rows, layout.inter_padded),
    )


def call_us(spec: ExpertSpec, kernels: tuple[Counted, Counted]) -> float:
    """A call's time: its kernels, one after the other, and what rounds their input for int8 and int4."""
    n_launches = 3 if is_quantised(spec.dtype) else 2
    return sum(each.us for each in kernels) + n_launches * LAUNCH_US


def share(card: Card, kernels: tuple[Counted, Counted], us: float) -> float:
    """Of the card's read rate."""
    return sum(each.n_bytes for each in kernels) / (us * 1e3) / card.gbps


def loop_share(card: Card, kernels: tuple[Counted, Counted]) -> float:
    """Of the read rate while both loops run."""
    return sum(each.n_bytes for each in kernels) / sum(each.n_bytes / each.gbps for each in kernels) / card.gbps


def loops_table() -> list[str]:
    """A row for each card, dtype and number of tokens: what limits both kernels of eight experts of OLMoE."""
    rows = [
        "| card | dtype | tokens | instructions a KiB | loads of 16 B a turn | registers |"
        " KiB under way a multiprocessor, up / down | KiB that fill it | rate of the loops | limit, up / down |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        for dtype in DTYPES:
            for tokens in (1, 4):
                hidden, inter, experts = SHAPES["olmoe"]
                spec = ExpertSpec(hidden, inter, dtype)
                found, made = counted(card, spec, experts, tokens), codes(card.arch, spec, 1 if tokens == 1 else 4)
                needed = card.gbps * LOAD_US / card.multiprocessors * 1e3 / 1024
                per_kib = made[0].loop["all"] / (made[0].wide_loads * 16 * THREADS) * 1024
                reached = loop_share(card, found)
                rows.append(
                    f"| {card.name} | {dtype} | {tokens} | {per_kib:.0f} | {made[0].wide_loads}, {made[1].wide_loads} |"
                    f" {made[0].registers}, {made[1].registers} |"
                    f" {' / '.join(f'{each.under_way / 1024:.0f}' for each in found)} | {needed:.0f} | {reached:.0%} |"
                    f" {' / '.join(each.limit for each in found)} |"
                )
    return rows


def calls_table() -> list[str]:
    """A row for each card and shape: a call's us and share of the read rate at one token, for each dtype."""
    rows = ["| card | shape, experts | " + " | ".join(DTYPES) + " |", "|---|---|" + "---|" * len(DTYPES)]
    for card in CARDS:
        for name, (hidden, inter, experts) in SHAPES.items():
            cells = []
            for dtype in DTYPES:
                spec = ExpertSpec(hidden, inter, dtype)
                kernels = counted(card, spec, experts, 1)
                us = call_us(spec, kernels)
                cells.append(f"{us:.1f} us, {share(card, kernels, us):.0%}")
            rows.append(f"| {card.name} | {name}, {experts} | " + " | ".join(cells) + " |")
    return rows


def single_table() -> list[str]:
    """A row for each card, shape and dtype that rounds its input or is under the goal: several launches beside one."""
    rows = [
        "| card | shape, experts | dtype | several launches | cut of one | instructions a KiB, up / down | registers |"
        " rate of the loops | one launch | of the time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        for name, (hidden, inter, experts) in SHAPES.items():
            for dtype in DTYPES:
                spec = ExpertSpec(hidden, inter, dtype)
                kernels = counted(card, spec, experts, 1)
                several_us = call_us(spec, kernels)
                before = f"{several_us:.1f} us, {share(card, kernels, several_us):.0%}"
                best = min(singles_on(card, spec), key=lambda number: single_us(
                    counted_in_one(card, spec, experts, number)
                ))  # fmt: skip
                found, made = counted_in_one(card, spec, experts, best), single_code(card.arch, spec, best)
                us = single_us(found)
                per_kib = [code.loop["all"] / (code.wide_loads * 16 * THREADS) * 1024 for code in made]
                cut = candidates(dtype, 1, divmod(card.arch, 10))[best].label.removesuffix(", one launch")
                rows.append(
                    f"| {card.name} | {name}, {experts} | {dtype} | {before} | {cut} |"
                    f" {' / '.join(f'{each:.0f}' for each in per_kib)} | {made[0].registers} |"
                    f" {loop_share(card, found):.0%} | {us:.1f} us, {share(card, found, us):.0%} |"
                    f" {us / several_us:.0%} |"
                )
    return rows


def attention(card: Card, tokens: int, heads: int = 32, kv_heads: int = 4, size: int = 128) -> tuple[Counted, float]:
    """A decode step's attention of one layer over so many tokens, bfloat16, as in Qwen3-30B-A3B: its kernel of parts,
    and us with the one that joins them."""
    splits = splits_for(kv_heads, tokens)
    made = ahead.compiled_attention(
        ("cuda", card.arch, THREADS), size, "bf16", group=heads // kv_heads, splits=splits, masked=False
    )
    lines, used = ahead.assembly(made.asm["cubin"]), ahead.resources(made.asm["cubin"])
    within, whole = counts_of(ahead.loop_of(lines)), counts_of(lines)
    once = {unit: whole[unit] - within[unit] for unit in whole}
    code = Code(within, once, used["REG"], made.metadata.shared, 0)
    program_bytes = 2 * 2 * size * tokens // splits
    turn_bytes = 2 * 2 * size * keys_at_once(2 * 2 * size)
    turns = -(-program_bytes // turn_bytes)
    ahead_bytes = (made.metadata.num_stages - 1) * turn_bytes
    found = kernel(card, code, Cut(made.metadata.num_warps), kv_heads * splits, program_bytes, ahead_bytes, turns)
    return found, found.us + 2 * LAUNCH_US + FIRST_LOADS * LOAD_US


def attention_table() -> list[str]:
    """A row for each card and context."""
    rows = [
        "| card | tokens | KiB under way a multiprocessor | rate of the loop | limit | us | of the read rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        for tokens in (2048, 8192, 32768):
            found, us = attention(card, tokens)
            rows.append(
                f"| {card.name} | {tokens:,} | {found.under_way / 1024:.0f} | {found.gbps / card.gbps:.0%} |"
                f" {found.limit} | {us:.1f} | {found.n_bytes / (us * 1e3) / card.gbps:.0%} |"
            )
    return rows


def agreement() -> list[tuple[str, float, float]]:
    """Each measured call of an H200: what it is, us counted, us measured."""
    found = []
    for (name, experts, tokens), times in MEASURED.items():
        for dtype, measured in zip(DTYPES, times, strict=True):
            spec = ExpertSpec(*SHAPES[name][:2], dtype)
            us = call_us(spec, counted(H200, spec, experts, tokens))
            found.append((f"{name}, {experts} experts, {tokens} token{'s' * (tokens > 1)}, {dtype}", us, measured))
    return found


PAGE = """# Expert kernels: counted

Written by `benchmarks/gpu_counted.py` without a card: **counted, not measured**. Each kernel for few tokens is
compiled for the card's architecture, and instructions, registers and loads of the machine's code are counted. A
loop reads at the least of three rates: the card's own by its data sheet; that at which the loads under way fill
the {load_ns:.0f} ns that one is assumed to take while memory is busy; that at which a multiprocessor runs the
instructions. A call has {launch_us} us for each launch (measured in graphs on an H200) and {first_loads} loads
of each kernel that nothing overlaps. What was measured on cards stands in [gpu-measured.md](gpu-measured.md).

## Loops

Eight experts of OLMoE (2048 x 1024), the default cut. The goal is {goal:.0%} of the card's read rate.

{loops}

## Calls of one token

With launches and first loads, every kernel after the one before it. Where loops are fast and calls are not, the
launches are the time: experts so small are read in less.

{calls}

## One launch

The kernel of one launch (`gpu_kernels/triton/single.py`): its programs of up round their input themselves, those of
down read their first weights and wait. A session takes it where its own timing on the card finds it faster; **no
card has run it yet**. Counted with one launch, {ticket_trips} trips to the second-level cache before the first
lines and {hand_over_trips} behind the last program of up, of {near_ns:.0f} ns each. What is outside of both loops
counts in full for each program, which runs a part of it: where that limits (int4 on an A100 and H100), one launch
is faster than it stands here. It is slower where memory has nothing to do while programs of down wait: where all
programs of up run at once, and registers have room for few of down's. From Hopper on several launches overlap,
which is not counted in their times either (below). Of the cuts the one that counts as the fastest.

{single}

## Attention of one token

Flash decoding over the keys and values of a layer as Qwen3-30B-A3B has them (32 heads, 4 of keys, 128 values,
bfloat16): parts, then one launch that joins them. Not measured on a card by itself.

{attention}

## Beside what was measured

NVIDIA H200, read rate {h200:.0f} GB/s (a sum over its memory), {n_rows} calls: the median of the differences is
{middle:.0%}, from {least:+.0%} to {most:+.0%}. Launches overlapped there (programmatic dependent launch), which
makes one or two experts faster than counted, and the measured rows are the best of the cuts that a session
chooses from, which is not counted here. Four tokens take longer than counted: eight warps of 254 registers have
a multiprocessor to themselves, and cannot hide each other's arithmetic.

{beside}
"""


def page() -> str:
    """The document."""
    rows = agreement()
    errors = sorted(us / measured - 1 for _, us, measured in rows)
    beside = ["| call | us counted | us measured | difference |", "|---|---|---|---|"]
    beside += [f"| {what} | {us:.1f} | {measured:.1f} | {us / measured - 1:+.0%} |" for what, us, measured in rows]
    return PAGE.format(
        load_ns=LOAD_US * 1e3, launch_us=LAUNCH_US, first_loads=FIRST_LOADS, goal=GOAL, h200=H200.gbps,
        n_rows=len(rows), middle=sorted(abs(error) for error in errors)[len(errors) // 2],
        least=errors[0], most=errors[-1],
        loops="\n".join(loops_table()), calls="\n".join(calls_table()), single="\n".join(single_table()),
        near_ns=NEAR_US * 1e3, ticket_trips=TICKET_TRIPS, hand_over_trips=HAND_OVER_TRIPS,
        attention="\n".join(attention_table()), beside="\n".join(beside),
    )  # fmt: skip


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
