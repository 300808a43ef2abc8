"""A layer's output from its experts' rows: the kernel's bits are those of torch and of the host."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cpu_kernels import get_backend
from gpu_kernels import TorchAccelerator
from gpu_kernels.combining import combine_on_host
from gpu_kernels.fused_choice import FusedChoice, RowsOfCall
from tests.fake_device import DEVICE_TYPE, Cards, fake_cards

from .conftest import Experts

ROOT = Path(__file__).parents[2]
FIRST = torch.device(DEVICE_TYPE, 0)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def cards() -> Iterator[Cards]:
    with fake_cards(1) as found:
        yield found


@needs_triton
def test_the_kernel_in_the_interpreter() -> None:
    """In its own process: Triton decides between interpreter and compiler when kernels are defined."""
    script = Path(__file__).with_name("triton_combine.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == 4, done.stdout


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("target", [("cuda", 90, 32), ("cuda", 80, 32), ("hip", "gfx942", 64)], ids=str)
@pytest.mark.parametrize("has_host_rows", [True, False])
def test_the_kernel_compiles_without_a_device(target: tuple[str, int | str, int], has_host_rows: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gpu_kernels.triton.combine import BLOCK_COLUMNS, combine_kernel

    constants = {"TOP_K": 8, "HAS_HOST_ROWS": has_host_rows, "BLOCK": BLOCK_COLUMNS}
    types = {
        "rows_ptr": "*fp32", "host_rows_ptr": "*fp32", "source_ptr": "*i32", "out_ptr": "*bf16", "n_columns": "i32",
    } | dict.fromkeys(constants, "constexpr")  # fmt: skip
    at = {(combine_kernel.arg_names.index(name),): value for name, value in constants.items()}
    stages = triton.compile(ASTSource(combine_kernel, types, constexprs=at), target=GPUTarget(*target)).asm
    assert "cubin" in stages or "hsaco" in stages


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_where_an_expert_ran(
    cards: Cards, make_experts: Callable[..., Experts], absent: bool, dtype: torch.dtype
) -> None:
    """The same rows, none, some or all of them from the host."""
    experts, outputs = make_experts(), []
    for n_on_host in (0, 2, 6):
        work = experts.work(5, 3, absent=absent)
        positions = np.arange(len(work.dispatch.expert_ids), dtype=np.int32)
        addresses = np.array([experts.records[expert].ctypes.data for expert in work.dispatch.expert_ids], np.uint64)
        get_backend("reference").run(
            experts.spec, addresses, positions, work.dispatch, work.host_hidden, work.host_rows
        )
        work.hidden, work.like = work.hidden.to(FIRST), work.hidden.to(dtype)
        if n_on_host == len(positions):
            outputs.append(combine_on_host(work))
        accelerator = TorchAccelerator(FIRST)
        work.host_positions = positions[:n_on_host]
        state, _ = accelerator._enter(work)
        rest = np.setdiff1d(work.dispatch.rows, [
            row for p in positions[:n_on_host]
            for row in work.dispatch.rows[work.dispatch.offsets[p] : work.dispatch.offsets[p + 1]]
        ])  # fmt: skip
        state.rows[torch.from_numpy(rest.astype(np.int64)).to(FIRST)] = torch.from_numpy(work.host_rows[rest]).to(FIRST)
        for _ in range(2):  # compared with torch's in the first turn
            outputs.append(accelerator.combine(work, []).cpu())
        accelerator.close()
    assert all(output.dtype == dtype for output in outputs)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("problem", ["compiler", "values"])
def test_a_faulty_kernel_is_reported_once_and_not_used(problem: str) -> None:
    rows, calls = torch.ones(4, 8), []

    def faulty(rows: torch.Tensor, *_: object) -> torch.Tensor:
        calls.append(rows)
        if problem == "compiler":
            raise RuntimeError("no such instruction")
        return rows[:2] * 3

    choice = FusedChoice(None, faulty)  # type: ignore[arg-type]
    given = RowsOfCall(rows, None, None, 2, torch.float32)
    with pytest.warns(RuntimeWarning, match=r"adds up rows is not used.*(no such instruction|differ)"):
        assert torch.equal(choice.combine(given, lambda: rows[:2] * 2), rows[:2] * 2)
    assert torch.equal(choice.combine(given, lambda: rows[:2] * 2), rows[:2] * 2)
    assert len(calls) == 1
