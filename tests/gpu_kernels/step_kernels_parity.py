"""Run by test_step_kernels.py with TRITON_INTERPRET=1: decode attention and RMSNorm against torch's."""

from __future__ import annotations

import sys

import torch
from interpreting import mend_the_interpreter
from torch.nn.functional import scaled_dot_product_attention

from gpu_kernels.triton.attention import decode_attention
from gpu_kernels.triton.norms import rms_norm

CASES = [  # sequences, heads, key heads, size, size of values, room, tokens held, first, masked, dtype
    (1, 4, 4, 16, 16, 64, 5, 0, False, torch.float32),
    (1, 8, 2, 32, 32, 300, 299, 0, False, torch.float32),
    (2, 4, 1, 24, 40, 200, 130, 0, True, torch.float32),
    (3, 2, 2, 16, 16, 130, 129, 0, True, torch.bfloat16),
    (1, 6, 2, 64, 64, 700, 650, 0, False, torch.bfloat16),
    (1, 4, 2, 16, 16, 256, 100, 40, True, torch.float32),
    (2, 32, 1, 16, 16, 128, 64, 0, False, torch.float32),
]


def check_norms(generator: torch.Generator) -> None:
    for size, dtype, offset, round_first in (
        (64, torch.float32, 0.0, True),
        (100, torch.float32, 1.0, False),
        (96, torch.bfloat16, 0.0, True),
        (128, torch.bfloat16, 1.0, False),
    ):
        x, weight = (torch.randn(*shape, size, generator=generator).to(dtype) for shape in ((2, 3), ()))
        wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
        wide = wide.to(dtype).float() if round_first else wide
        expected = (wide * (weight.float() + offset)).to(dtype)
        error = float(
            (rms_norm(x, weight, 1e-5, offset, round_first) - expected).float().norm() / expected.float().norm()
        )
        assert error < (1e-6 if dtype == torch.float32 else 1e-2), (size, dtype, error)  # the interpreter cuts bits off
        sys.stdout.write(f"ok norm {size} {error}\n")


def main() -> None:
    mend_the_interpreter()
    check_norms(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    for n, heads, kv_heads, size, v_size, room, held, first, masked, dtype in CASES:
        query = torch.randn(n, heads, 1, size, generator=generator).to(dtype)
        keys = torch.randn(n, kv_heads, room, size, generator=generator).to(dtype)
        values = torch.randn(n, kv_heads, room, v_size, generator=generator).to(dtype)
        used = torch.arange(room) < held
        keys[:, :, held:], values[:, :, held:] = 0, 0
        seen = used.expand(n, 1, 1, room).clone()
        if masked:
            seen &= torch.rand(n, 1, 1, room, generator=generator) < 0.7
            seen[..., 0] = True
        scale = 0.3
        found = decode_attention(
            query, keys, values, seen if masked else None, torch.tensor(first + held - 1), first, scale, exact=True
        )
        wide = [each.repeat_interleave(heads // kv_heads, dim=1).float() for each in (keys, values)]
        expected = scaled_dot_product_attention(query.float(), *wide, attn_mask=seen, scale=scale).transpose(1, 2)
        error = float((found.float() - expected).norm() / expected.norm())
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), (heads, kv_heads, error)
        sys.stdout.write(f"ok {heads} {kv_heads} {room} {error}\n")


if __name__ == "__main__":
    main()
