"""Attention and norms of decode steps on a card: parity in Triton's interpreter, what Triton makes of them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu_kernels.step_kernels import StepKernels, load_step_kernels, takes

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Shared memory that a program may have, by compute capability."""


@needs_triton
def test_parity_in_the_interpreter() -> None:
    """In its own process: Triton decides between interpreter and compiler when kernels are defined."""
    script = Path(__file__).with_name("step_kernels_parity.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == 11, done.stdout


@needs_triton
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize(("size", "dtype"), [(128, "bf16"), (256, "bf16"), (128, "fp32"), (192, "fp32")])
def test_it_compiles_without_tf32_or_spills_and_fits_the_shared_memory(capability: int, size: int, dtype: str) -> None:
    from gpu_kernels.triton.ahead import compiled_attention

    made = compiled_attention(("cuda", capability, 32), size, dtype)
    assert "tf32" not in made.asm["ptx"]
    assert "ld.local" not in made.asm["ptx"]
    assert made.metadata.shared <= SHARED_BYTES[capability]


def test_what_the_kernel_takes() -> None:
    query, keys = torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 64, 16)
    seen = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    assert takes(query, keys, keys, seen)
    assert takes(query, keys, keys, seen[:1])
    assert takes(query, keys, keys, None)
    assert not takes(torch.zeros(2, 4, 3, 16), keys, keys, None), "several new tokens"
    assert not takes(query.double(), keys, keys, None), "another dtype"
    assert not takes(query, keys, keys, seen.float()), "a mask that is added"
    assert not takes(query, keys, keys, seen[..., :32]), "a mask of fewer tokens"
    assert not takes(query, keys.transpose(2, 3).contiguous().transpose(2, 3), keys, None), "rows that are apart"
    assert not takes(torch.zeros(2, 3, 1, 16), keys, keys, None), "heads that do not divide"


def test_none_on_the_host() -> None:
    assert load_step_kernels(torch.device("cpu")) == StepKernels()
