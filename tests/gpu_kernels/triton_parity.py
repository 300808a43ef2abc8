"""Run by test_triton_kernels.py with TRITON_INTERPRET=1: the fused kernels against the CPU's kernels and the reference.

Arguments: dtypes, with a comma between them. One line "ok" for each case.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch
from interpreting import mend_the_interpreter

from cpu_kernels import (
    Activation,
    ExpertSpec,
    ExpertWeights,
    build_dispatch,
    get_backend,
    pack_expert,
    reference_ffn,
    relative_error,
    tolerance,
)
from cpu_kernels import unpack_expert as unpack
from cpu_kernels.format.layout import is_quantised
from gpu_kernels.fused_choice import Group
from gpu_kernels.triton import fused
from gpu_kernels.triton.cuts import BLOCK_TOKENS, FEW_TOKENS, Cuts, candidates

GPT_OSS = Activation("silu", alpha=1.702, gate_max=7.0, up_limit=7.0, up_offset=1.0)
ACTIVATIONS = (
    (GPT_OSS, True),
    (Activation("gelu_tanh"), False),
    (Activation("relu2", gated=False), True),
    (Activation("sigmoid", gated=False), False),
    (Activation("relu", act_max=0.5), True),
    (Activation("gelu"), False),
    (Activation("identity"), True),
)
SHAPES = ((80, 48), (65, 1), (33, 100), (200, 72), (2080, 64), (64, 1060))
"""(hidden, inter): the last two take several rounds of the loop over columns."""
GROUPS = ([1], [1, 1], [3, 1], [4], [5, 2], [16], [17, 1], [64], [67, 3], [70, 33, 40], [9, 12])
"""Tokens of each expert of a group: every block of tokens that there is, alone and mixed, and more than the largest; in
the last all have the same block, so that its parts can be compared with it."""
ORDER = 2e-6
"""Relative error between the same sums in another order."""
TRUNCATED = 1e-5
"""Allowed where float32 becomes two bfloat16: the interpreter cuts digits off (2^-16), hardware rounds (2^-18)."""
TOP_K = 2


def packed(spec: ExpertSpec, generator: torch.Generator) -> np.ndarray:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    gated, bias, hidden, inter = spec.activation.gated, spec.has_bias, spec.hidden, spec.inter
    weights = ExpertWeights(
        up=random(inter, hidden),
        down=random(hidden, inter),
        gate=random(inter, hidden) if gated else None,
        gate_bias=random(inter) if bias and gated else None,
        up_bias=random(inter) if bias else None,
        down_bias=random(hidden) if bias else None,
    )
    record = np.zeros(spec.record_bytes, np.uint8)
    pack_expert(spec, weights, record)
    return record


def on_the_cpu(spec: ExpertSpec, record: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows of one expert by the CPU's kernels."""
    dispatch = build_dispatch(np.zeros((len(x), 1), np.int64), weights.numpy()[:, None].copy(), 1)
    out = np.zeros((len(x), spec.hidden), np.float32)
    records = np.array([record.data_ptr()], np.uint64)
    get_backend("numba", 1).run(spec, records, np.zeros(1, np.int32), dispatch, x.numpy(), out)
    return torch.from_numpy(out)


def check(spec: ExpertSpec, n_tokens: list[int], cuts: Cuts | None = None) -> None:
    """Experts with so many rows each, the rows of a call in random order. Rows of no expert must stay untouched."""
    generator = torch.Generator().manual_seed(sum(n_tokens))
    slots = torch.full((len(n_tokens) + 1, -(-spec.record_bytes // 256) * 256), 255, dtype=torch.uint8)
    for slot in slots:
        slot[: spec.record_bytes] = torch.from_numpy(packed(spec, generator))
    slot_ids = torch.randperm(len(slots), generator=generator)[: len(n_tokens)].int()
    n_all = (sum(n_tokens) + 3) // TOP_K * TOP_K
    rows = torch.randperm(n_all, generator=generator)[: sum(n_tokens)]
    offsets = torch.tensor([0, *np.cumsum(n_tokens)], dtype=torch.int32)
    hidden = torch.randn(n_all // TOP_K, spec.hidden, generator=generator)
    weights = torch.rand(n_all, generator=generator)
    out = torch.full((n_all, spec.hidden), float("nan"))
    fused.run_group(spec, slots, slot_ids, offsets, rows, n_tokens, hidden, weights, TOP_K, out, cuts=cuts)
    if cuts is None:
        group = Group(slot_ids, offsets, rows, n_tokens, hidden, weights, TOP_K, out)
        check_parts(group, spec, slots)
        check_unknown_numbers(group, spec, slots)
    tiles_of_bfloat16 = spec.dtype == "bfloat16" and fused.block_tokens(n_tokens) > FEW_TOKENS
    for slot, part in zip(slot_ids.tolist(), torch.split(rows, n_tokens), strict=True):
        record, x = slots[slot, : spec.record_bytes], hidden[part // TOP_K]
        if is_quantised(spec.dtype):
            same_as(spec, n_tokens, out[part], on_the_cpu(spec, record, x.contiguous(), weights[part]), ORDER)
            continue
        expected = reference_ffn(spec, unpack(spec, record), x) * weights[part].unsqueeze(1)
        same_as(spec, n_tokens, out[part], expected, TRUNCATED if tiles_of_bfloat16 else tolerance(spec))
    untouched = sorted(set(range(len(out))) - set(rows.tolist()))
    if not out[untouched].isnan().all():
        sys.exit(f"{spec}, {n_tokens}: rows of no expert were written")
    sys.stdout.write("ok\n")


def check_parts(group: Group, spec: ExpertSpec, slots: torch.Tensor) -> None:
    """Expert by expert, with what the parts share, where the same kernel serves both: the group's bits."""
    n_tokens, out = group.n_tokens, torch.full_like(group.out, float("nan"))
    if any(fused.block_tokens([n]) != fused.block_tokens(n_tokens) for n in n_tokens):
        return
    whole = replace(group, out=out, prepared={})
    for number in range(len(n_tokens)):
        part = whole.part(number, 1)
        fused.run_group(
            spec, slots, part.slot_ids, part.offsets, part.rows, part.n_tokens, part.hidden, part.weights, TOP_K, out,
            prepared=part.prepared,
        )  # fmt: skip
    if not torch.equal(out.view(torch.int32), group.out.view(torch.int32)):
        sys.exit(f"{spec}, {n_tokens}: parts of a group give other values than the whole")


def check_unknown_numbers(group: Group, spec: ExpertSpec, slots: torch.Tensor) -> None:
    """A host that knows only how many rows there are in all: the values of one that knows each expert's."""
    n_rows, n_experts = sum(group.n_tokens), len(group.n_tokens)
    expected, out = [-(-n_rows // n_experts)] * n_experts, torch.full_like(group.out, float("nan"))
    fused.run_group(
        spec, slots, group.slot_ids, group.offsets, group.rows, expected, group.hidden, group.weights, TOP_K, out,
        most=n_rows,
    )  # fmt: skip
    same_as(spec, group.n_tokens, out[group.rows], group.out[group.rows], TRUNCATED)
    if not torch.equal(out.isnan(), group.out.isnan()):
        sys.exit(f"{spec}, {group.n_tokens}: other rows were written where only their sum was known")


def same_as(spec: ExpertSpec, n_tokens: list[int], rows: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    error = relative_error(rows, expected)
    if not error <= allowed:
        sys.exit(f"{spec}, {n_tokens}: relative error {error}, allowed {allowed}")


def check_broken_input() -> None:
    """A token that is not finite gives NaN, as on the CPU, and only in its own row."""
    for dtype in ("int4", "int8", "bfloat16"):
        spec = ExpertSpec(96, 64, dtype)  # type: ignore[arg-type]
        for n_tokens in (2, 6):
            slots = torch.from_numpy(packed(spec, torch.Generator().manual_seed(0))).unsqueeze(0)
            hidden, rows = torch.ones(n_tokens, 96), torch.arange(n_tokens)
            hidden[1, 40], out = float("inf"), torch.zeros(n_tokens, 96)
            slot_ids, offsets = torch.zeros(1, dtype=torch.int32), torch.tensor([0, n_tokens], dtype=torch.int32)
            fused.run_group(
                spec, slots, slot_ids, offsets, rows, [n_tokens], hidden, torch.ones(n_tokens), 1, out
            )  # fmt: skip
            if out[1].isfinite().any() or not out[[0, *range(2, n_tokens)]].isfinite().all():
                sys.exit(f"{dtype}, {n_tokens} tokens: an input that is not finite is not told")
    sys.stdout.write("ok\n")


if __name__ == "__main__":
    mend_the_interpreter()
    np.seterr(invalid="ignore", over="ignore")
    for number, dtype in enumerate(sys.argv[1].split(",")):
        for case, n_tokens in enumerate(GROUPS):
            activation, has_bias = ACTIVATIONS[(case + number) % len(ACTIVATIONS)]
            hidden, inter = SHAPES[(case + 2 * number) % len(SHAPES)]
            check(ExpertSpec(hidden, inter, dtype, activation, has_bias), n_tokens)  # type: ignore[arg-type]
        for block in BLOCK_TOKENS:
            for cuts in candidates(dtype, block, None)[1:]:  # type: ignore[arg-type]
                check(ExpertSpec(80, 48, dtype, GPT_OSS, has_bias=True), [block], cuts)  # type: ignore[arg-type]
    check_broken_input()
