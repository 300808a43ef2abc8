"""The fused Triton kernels: parity in Triton's interpreter, and compilation for NVIDIA and AMD without a device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cpu_kernels import Activation, ExpertSpec, relative_error
from gpu_kernels import TorchAccelerator
from gpu_kernels.fused_choice import FusedChoice

from .conftest import Experts

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_parity_in_the_interpreter() -> None:
    """In its own process: Triton decides between interpreter and compiler when kernels are defined."""
    script = Path(__file__).with_name("triton_parity.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == 9, done.stdout


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("backend", "arch", "warp"), [("cuda", 80, 32), ("hip", "gfx942", 64)])
@pytest.mark.parametrize(("dtype", "lines"), [(0, 8), (2, 32)])
def test_kernels_compile_without_a_device(backend: str, arch: int | str, warp: int, dtype: int, lines: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gpu_kernels.triton import kernels

    wide = {"rows_ptr": "*i64", "slots_ptr": "*i32", "slot_ids_ptr": "*i32", "offsets_ptr": "*i32"}
    real = ("alpha", "gate_max", "act_max", "up_limit", "up_offset")
    for kernel, more in ((kernels.up_kernel, {"KIND": 0, "GATED": True}), (kernels.down_kernel, {})):
        constants = {"BLOCK_M": 4, "LINES": lines, "DTYPE": dtype, "HAS_BIAS": True} | more
        types = {
            name: "constexpr" if name in constants
            else wide.get(name, "*fp32" if name.endswith("_ptr") else "fp32" if name in real else "i32")
            for name in kernel.arg_names
        }  # fmt: skip
        at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = triton.compile(ASTSource(kernel, types, constexprs=at), target=GPUTarget(backend, arch, warp))
        assert "cubin" in compiled.asm or "hsaco" in compiled.asm


class Faulty:
    """Stands for kernels that are wrong, or do not compile, on some device."""

    MAX_TOKENS = 16

    def __init__(self, problem: str) -> None:
        self.problem, self.calls = problem, 0

    def supports(self, spec: ExpertSpec) -> bool:
        return True

    def block_tokens(self, n_tokens: list[int]) -> int:
        return 1

    def run_group(self, *arguments: object) -> None:
        self.calls += 1
        if self.problem == "compiler":
            raise RuntimeError("no such instruction")
        out, rows = arguments[-1], arguments[4]
        out[rows] = 7.0  # type: ignore[index]


@pytest.mark.parametrize(("problem", "message"), [("compiler", "no such instruction"), ("values", "differ")])
def test_faulty_kernels_are_reported_once_and_not_used(
    make_experts: Callable[..., Experts], problem: str, message: str
) -> None:
    experts, faulty = make_experts(), Faulty(problem)
    accelerator = TorchAccelerator("cpu")
    accelerator._fused = FusedChoice(faulty)
    accelerator.allocate(6, experts.spec.record_bytes)
    work = experts.work(4, 2)
    ids = work.dispatch.expert_ids.tolist()
    for expert in ids:
        accelerator.copy_to_slot(expert, experts.records[expert])
    with pytest.warns(RuntimeWarning, match=message):
        event = accelerator.run_experts(experts.spec, ids, range(len(ids)), work)
    assert relative_error(accelerator.combine(work, [event]), experts.expected(work)) < 1e-5
    accelerator.run_experts(experts.spec, ids, range(len(ids)), experts.work(4, 2))
    assert faulty.calls == 1
    accelerator.close()


def test_prompts_and_custom_activations_are_left_to_torch() -> None:
    class Never(Faulty):
        def supports(self, spec: ExpertSpec) -> bool:
            return spec.activation.kind != "custom"

    choice = FusedChoice(Never("values"))
    plain = ExpertSpec(64, 64, "int4", Activation("silu"))
    custom = ExpertSpec(64, 64, "int4", Activation("custom", custom=torch.relu))
    assert choice.accepts(plain, [1, 16])
    assert not choice.accepts(plain, [1, 17])
    assert not choice.accepts(custom, [1])
