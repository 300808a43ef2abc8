"""Run by test_triton_single.py with TRITON_INTERPRET=1: the kernel of one launch against those of several launches.

Arguments: dtypes, with a comma between them. One line "ok" for each case.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
import triton.language as tl
from interpreting import mend_the_interpreter
from triton_parity import ACTIVATIONS, ORDER, SHAPES, on_the_cpu, packed, same_as

from cpu_kernels import ExpertSpec, reference_ffn, tolerance, unpack_expert
from cpu_kernels.format.layout import is_quantised
from gpu_kernels.triton import fused, single, tickets
from gpu_kernels.triton.cuts import SINGLE_FROM, Cuts, candidates

ABSENT = -1
TOP_K = 2
STEPS = ((5, 3), (2, ABSENT, 0, 4), (ABSENT,), (1,), (ABSENT, 6, 6, 2, ABSENT, 3), (ABSENT, ABSENT, 5))
"""Slots of the pairs of launches that follow each other with the same counters: others in number and kind each time,
one expert twice, none at all."""
FEW_STEPS = (*STEPS[2:4], STEPS[0])
"""For shapes of many programs."""
MANY = 1000
"""Columns of such a shape."""
HELD = (1, 2, 5)
"""Programs that a card holds at once."""


@dataclass(frozen=True)
class Call:
    """Pairs of one row each; rows of no pair have no meaning."""

    spec: ExpertSpec
    slots: torch.Tensor
    slot_ids: torch.Tensor
    hidden: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, spec: ExpertSpec, slots: torch.Tensor, slot_ids: tuple[int, ...]) -> Call:
        generator = torch.Generator().manual_seed(len(slot_ids))
        hidden = torch.randn(-(-len(slot_ids) // TOP_K), spec.hidden, generator=generator)
        weights = torch.rand(len(slot_ids), generator=generator)
        return cls(spec, slots, torch.tensor(slot_ids, dtype=torch.int32), hidden, weights)

    def run(self, cuts: Cuts, state: torch.Tensor | None) -> torch.Tensor:
        n_pairs = len(self.slot_ids)
        out = torch.full((n_pairs, self.spec.hidden), 7.0)
        offsets, rows = torch.arange(n_pairs + 1, dtype=torch.int32), torch.arange(n_pairs)
        fused.run_group(
            self.spec, self.slots, self.slot_ids, offsets, rows, [1] * n_pairs, self.hidden, self.weights, TOP_K, out,
            cuts=cuts, state=state,
        )  # fmt: skip
        return out


def check_steps(spec: ExpertSpec, cuts: Cuts) -> None:
    """Launch after launch with the same counters: the bits of several launches, and counters ready for the next."""
    slots, state = slots_of(spec), fused.new_state(torch.device("cpu"))
    for number, slot_ids in enumerate(FEW_STEPS if max(spec.hidden, spec.inter) > MANY else STEPS):
        call = Call.of(spec, slots, slot_ids)
        out = call.run(cuts, state)
        same_bits(call, out, call.run(cuts, None))
        compare_with_the_reference(call, out)
        ready(state, launches=number + 1)
    sys.stdout.write("ok\n")


def check_any_order(spec: ExpertSpec, cuts: Cuts) -> None:
    """Programs in any order of the grid, many at once: waiting ends, and gives the same bits."""
    slots, state = slots_of(spec), fused.new_state(torch.device("cpu"))
    expected = [Call.of(spec, slots, slot_ids).run(cuts, None) for slot_ids in STEPS]
    Call.of(spec, slots, STEPS[0]).run(cuts, fused.new_state(torch.device("cpu")))  # functions are rewritten once
    launches = 0
    for held in HELD:
        for slot_ids, rows in zip(STEPS, expected, strict=True):
            call = Call.of(spec, slots, slot_ids)
            with at_once(held, programs_of(spec, cuts, len(slot_ids)), seed=launches):
                out = call.run(cuts, state)
            same_bits(call, out, rows)
            launches += 1
            ready(state, launches)
    sys.stdout.write("ok\n")


def check_what_does_not_fit(spec: ExpertSpec, cuts: Cuts) -> None:
    """More pairs than counters, an expert with two rows, and no counters: several launches; an expert without a row."""
    few = replace(spec, hidden=32, inter=32)
    slots, state = slots_of(few), fused.new_state(torch.device("cpu"))
    many = Call.of(few, slots, (3,) + (ABSENT,) * tickets.MAX_PAIRS.value)
    same_bits(many, many.run(cuts, state), many.run(cuts, None))
    hidden, weights, rows = torch.randn(2, 32), torch.rand(4), torch.tensor([2, 0, 1])
    for offsets, most in ((torch.tensor([0, 2, 3], dtype=torch.int32), 3), (torch.tensor([1, 1, 2]).int(), None)):
        out, expected = torch.zeros(4, 32), torch.zeros(4, 32)
        for target, given in ((out, state), (expected, None)):
            fused.run_group(
                few, slots, torch.tensor([2, 4], dtype=torch.int32), offsets, rows, [1, 1], hidden, weights, 2, target,
                cuts=cuts, most=most, state=given,
            )  # fmt: skip
        if not torch.equal(out, expected) or not out.any():
            sys.exit(f"{few}: other values than by several launches")
    ready(state, launches=1)
    sys.stdout.write("ok\n")


def check_a_broken_promise(spec: ExpertSpec, cuts: Cuts) -> None:
    """Should those that are waited for never come, a wait ends, and gives NaN: a result that the check with torch's
    refuses."""
    slots, state = slots_of(spec), fused.new_state(torch.device("cpu"))
    call, polls = Call.of(spec, slots, (3, ABSENT)), tickets.POLLS
    counts = 0

    def uncounted(count_ptr: Any) -> None:
        nonlocal counts
        counts += 1

    tell, single.tell, tickets.POLLS = single.tell, uncounted, tl.constexpr(10)  # type: ignore[assignment]
    try:
        out = call.run(cuts, state)
    finally:
        single.tell, tickets.POLLS = tell, polls
    if not counts or not out[0].isnan().all() or not (out[1] == 7.0).all():
        sys.exit(f"{spec}: a wait that was given up is not told")
    same_bits(call, call.run(cuts, state), call.run(cuts, None))
    sys.stdout.write("ok\n")


def slots_of(spec: ExpertSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    slots = torch.full((7, -(-spec.record_bytes // 256) * 256), 255, dtype=torch.uint8)
    for slot in slots:
        slot[: spec.record_bytes] = torch.from_numpy(packed(spec, generator))
    return slots


def programs_of(spec: ExpertSpec, cuts: Cuts, n_pairs: int) -> int:
    return n_pairs * (spec.layout.inter_padded // fused.UP_COLUMNS + spec.layout.hidden_padded // cuts.down.rows)


def same_bits(call: Call, out: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(out.view(torch.int32), expected.view(torch.int32)):
        sys.exit(f"{call.spec}, slots {call.slot_ids.tolist()}: other bits than by several launches")
    if not (out[call.slot_ids < 0] == 7.0).all():
        sys.exit(f"{call.spec}: rows of absent pairs were written")


def compare_with_the_reference(call: Call, out: torch.Tensor) -> None:
    """All rows of a call at once: a row of an expert with one column may be next to nothing."""
    spec, present = call.spec, (call.slot_ids >= 0).nonzero().flatten()
    expected = torch.zeros(len(present), spec.hidden)
    for number, row in enumerate(present.tolist()):
        record = call.slots[int(call.slot_ids[row]), : spec.record_bytes]
        x, weight = call.hidden[row // TOP_K, None], call.weights[row]
        if is_quantised(spec.dtype):
            expected[number] = on_the_cpu(spec, record, x.contiguous(), weight[None])[0]
        else:
            expected[number] = reference_ffn(spec, unpack_expert(spec, record), x)[0] * weight
    if len(present):
        same_as(spec, [1], out[present], expected, ORDER if is_quantised(spec.dtype) else tolerance(spec))


def ready(state: torch.Tensor, launches: int) -> None:
    """What `tickets` promises between two launches."""
    word, sets = int(state[0]), state[tickets.COUNTER_WORDS.value :].view(2, -1)
    if word != launches % 2 * tickets.IN_USE.value or sets[launches % 2].any():
        sys.exit(f"after {launches} launches the counters are not ready for another")


@contextmanager
def at_once(held: int, n_programs: int, seed: int) -> Iterator[None]:
    """Launches of the kernel run their programs shuffled, `held` at a time, in threads that take turns anywhere."""
    kernel, programs = single.single_kernel, [dict[str, Any]()][:0]
    rewrite = kernel.rewrite
    function: Callable[..., None] = rewrite()

    @wraps(function)
    def gathered(**arguments: Any) -> None:
        programs.append(arguments)
        if len(programs) == n_programs:
            random.Random(seed).shuffle(programs)
            with ThreadPoolExecutor(held) as threads:
                for done in [threads.submit(function, **program) for program in programs]:
                    done.result()

    gathered.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    kernel.rewrite = lambda: gathered
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        kernel.rewrite = rewrite
    if len(programs) != n_programs:
        sys.exit(f"{len(programs)} programs, {n_programs} expected: not the kernel of one launch")


if __name__ == "__main__":
    mend_the_interpreter()
    np.seterr(invalid="ignore", over="ignore")
    for number, dtype in enumerate(sys.argv[1].split(",")):
        every = [cuts for cuts in candidates(dtype, 1, SINGLE_FROM) if cuts.single]  # type: ignore[arg-type]
        for case, (activation, has_bias) in enumerate(ACTIVATIONS):
            hidden, inter = SHAPES[(case + number) % len(SHAPES)]
            spec = ExpertSpec(hidden, inter, dtype, activation, has_bias)  # type: ignore[arg-type]
            check_steps(spec, every[case % len(every)])
        plain = ExpertSpec(80, 48, dtype)  # type: ignore[arg-type]
        for cuts in every:
            check_any_order(plain, cuts)
        check_what_does_not_fit(plain, every[0])
        check_a_broken_promise(plain, every[0])
