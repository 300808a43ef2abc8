"""Run by test_triton_kernels.py with TRITON_INTERPRET=1: the fused kernels against the reference."""

from __future__ import annotations

import sys

import numpy as np
import torch

from cpu_kernels import Activation, ExpertDtype, ExpertSpec, ExpertWeights, pack_expert, reference_ffn, relative_error
from cpu_kernels import unpack_expert as unpack
from gpu_kernels.triton import fused

GPT_OSS = Activation("silu", alpha=1.702, gate_max=7.0, up_limit=7.0, up_offset=1.0)
CASES: list[tuple[ExpertDtype, Activation, bool]] = [
    ("int4", GPT_OSS, True),
    ("int8", Activation("gelu_tanh"), False),
    ("bfloat16", Activation("gelu"), True),
    ("float32", Activation("relu2", gated=False), True),
    ("int4", Activation("sigmoid", gated=False), False),
    ("int8", Activation("relu", act_max=0.5), True),
    ("bfloat16", Activation("identity"), False),
    ("float32", Activation("silu"), False),
]
HIDDEN, INTER, N_SLOTS, N_TOKENS, TOP_K = 80, 48, 3, 5, 2


def packed(spec: ExpertSpec, generator: torch.Generator) -> np.ndarray:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    gated, bias = spec.activation.gated, spec.has_bias
    weights = ExpertWeights(
        up=random(INTER, HIDDEN),
        down=random(HIDDEN, INTER),
        gate=random(INTER, HIDDEN) if gated else None,
        gate_bias=random(INTER) if bias and gated else None,
        up_bias=random(INTER) if bias else None,
        down_bias=random(HIDDEN) if bias else None,
    )
    record = np.zeros(spec.record_bytes, np.uint8)
    pack_expert(spec, weights, record)
    return record


def check(spec: ExpertSpec, groups: dict[int, list[int]]) -> None:
    """`groups`: slot -> rows. Rows of no group must stay untouched."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.zeros(N_SLOTS, -(-spec.record_bytes // 256) * 256, dtype=torch.uint8)
    for slot in slots:
        slot[: spec.record_bytes] = torch.from_numpy(packed(spec, generator))
    n_tokens = [len(rows) for rows in groups.values()]
    rows = torch.tensor([row for part in groups.values() for row in part])
    offsets = torch.tensor([0, *np.cumsum(n_tokens)], dtype=torch.int32)
    hidden = torch.randn(N_TOKENS, HIDDEN, generator=generator)
    weights = torch.rand(N_TOKENS * TOP_K, generator=generator)
    out = torch.full((N_TOKENS * TOP_K, HIDDEN), float("nan"))
    slot_ids = torch.tensor(list(groups), dtype=torch.int32)
    fused.run_group(spec, slots, slot_ids, offsets, rows, n_tokens, hidden, weights, TOP_K, out)
    for slot, part in groups.items():
        x = hidden[torch.tensor(part) // TOP_K]
        expected = reference_ffn(spec, unpack(spec, slots[slot, : spec.record_bytes]), x) * weights[part].unsqueeze(1)
        error = relative_error(out[part], expected)
        if not error < 1e-5:
            sys.exit(f"{spec}: relative error {error}")
    untouched = sorted(set(range(len(out))) - set(rows.tolist()))
    if not out[untouched].isnan().all():
        sys.exit(f"{spec}: rows of no expert were written")
    sys.stdout.write("ok\n")


if __name__ == "__main__":
    for dtype, activation, has_bias in CASES:
        check(ExpertSpec(HIDDEN, INTER, dtype, activation, has_bias), {2: [0, 2, 4, 6, 9], 0: [1, 3, 5]})
    check(ExpertSpec(HIDDEN, INTER, "int4"), {1: [7]})
