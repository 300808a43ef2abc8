"""The fused Triton kernels: parity in Triton's interpreter, and compilation for NVIDIA and AMD without a device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_kernels
from cpu_kernels import Activation, ExpertSpec, relative_error
from cpu_kernels.format.layout import LINES
from gpu_kernels import TorchAccelerator
from gpu_kernels.fused_choice import FusedChoice, Group, load_fused

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


def compile_both(target: tuple[str, int | str, int], dtype: str, block_tokens: int) -> list[dict[str, Any]]:
    """What Triton makes of both kernels for (backend, architecture, threads of a warp), by stage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gpu_kernels.triton import fused, kernels

    wide = {"rows_ptr": "*i64", "slots_ptr": "*i32", "slot_ids_ptr": "*i32", "offsets_ptr": "*i32"}
    real = ("alpha", "gate_max", "act_max", "up_limit", "up_offset")
    stages = []
    for kernel, more in ((kernels.up_kernel, {"KIND": 0, "GATED": True}), (kernels.down_kernel, {})):
        constants = {
            "BLOCK_M": block_tokens, "LINES": LINES[dtype], "DTYPE": fused.DTYPES[dtype], "HAS_BIAS": True,
        } | more  # fmt: skip
        types = {
            name: "constexpr" if name in constants
            else wide.get(name, "*fp32" if name.endswith("_ptr") else "fp32" if name in real else "i32")
            for name in kernel.arg_names
        }  # fmt: skip
        at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        stages.append(triton.compile(ASTSource(kernel, types, constexprs=at), target=GPUTarget(*target)).asm)
    return stages


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("target", [("cuda", 80, 32), ("hip", "gfx942", 64)], ids=["cuda", "hip"])
@pytest.mark.parametrize("dtype", ["int4", "bfloat16"])
def test_kernels_compile_without_a_device(target: tuple[str, int | str, int], dtype: str) -> None:
    for stages in compile_both(target, dtype, 4):
        assert "cubin" in stages or "hsaco" in stages


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
def test_no_product_is_rounded_to_tf32(arch: int, dtype: str) -> None:
    """Results are promised in float32: tensor cores would round both factors to 10 bits."""
    from gpu_kernels.triton import fused

    largest = max(fused.block_tokens([n_tokens]) for n_tokens in range(1, fused.MAX_TOKENS + 1))
    for stages in compile_both(("cuda", arch, 32), dtype, largest):
        assert "tf32" not in stages["ptx"]


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_larger_blocks_would_be_rounded() -> None:
    """Why MAX_BLOCK_TOKENS is what it is. If this fails, a newer Triton leaves such sums alone: raise the limit."""
    from gpu_kernels.triton import fused

    assert "tf32" in compile_both(("cuda", 89, 32), "int4", 2 * fused.MAX_BLOCK_TOKENS)[0]["ptx"]


@needs_triton
def test_what_changes_from_call_to_call_is_not_compiled_in() -> None:
    from gpu_kernels.triton import kernels

    for kernel in (kernels.up_kernel, kernels.down_kernel):
        parameters = {parameter.name: parameter for parameter in kernel.params}
        assert all(
            parameters[name].do_not_specialize_on_alignment
            for name in ("slot_ids_ptr", "offsets_ptr", "rows_ptr", "hidden_ptr", "weights_ptr")
            if name in parameters
        )
    assert kernels.up_kernel.params[kernels.up_kernel.arg_names.index("top_k")].do_not_specialize


@needs_triton
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 8, 9, 16])
def test_blocks_cover_the_tokens_in_powers_of_two(n_tokens: int) -> None:
    from gpu_kernels.triton import fused

    block = fused.block_tokens([1, n_tokens])
    assert block & (block - 1) == 0
    assert block >= min(n_tokens, fused.MAX_BLOCK_TOKENS)


class Faulty:
    """Stands for kernels that are wrong, or do not compile, on some device."""

    MAX_TOKENS = 16

    def __init__(self, problem: str) -> None:
        self.problem, self.calls = problem, 0

    def supports(self, spec: ExpertSpec) -> bool:
        return True

    def block_tokens(self, n_tokens: list[int]) -> int:
        return min(max(n_tokens), 8)

    def run_group(self, *arguments: object) -> None:
        self.calls += 1
        if self.problem == "compiler":
            raise RuntimeError("no such instruction")
        out, rows = arguments[-1], arguments[4]
        out[rows] = float("nan") if self.problem == "nan" else 7.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("problem", "message"), [("compiler", "no such instruction"), ("values", "differ"), ("nan", "differ")]
)
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


def group_of(experts: Experts, n_tokens: int) -> Group:
    """The first expert with `n_tokens` rows, as device tensors."""
    rows = torch.arange(n_tokens)
    hidden = torch.randn(n_tokens, experts.spec.hidden)
    return Group(
        torch.zeros(1, dtype=torch.int32), torch.tensor([0, n_tokens], dtype=torch.int32), rows, [n_tokens], hidden,
        torch.ones(n_tokens), 1, torch.zeros(n_tokens, experts.spec.hidden),
    )  # fmt: skip


def test_each_number_of_tokens_is_judged_by_itself(make_experts: Callable[..., Experts]) -> None:
    """One that is compiled wrongly says nothing of the others, and is found although a smaller one was right."""
    experts = make_experts()

    class WrongAtEight(Faulty):
        def run_group(self, *arguments: object) -> None:
            n_tokens, out, rows = arguments[5], arguments[-1], arguments[4]
            out[rows] = 1.0 if n_tokens[0] < 8 else 1.5  # type: ignore[index]

    choice, slots = FusedChoice(WrongAtEight("values")), torch.empty(0)

    def run(n_tokens: int) -> torch.Tensor:
        group = group_of(experts, n_tokens)
        if not choice.accepts(experts.spec, group.n_tokens):
            return torch.full_like(group.out, torch.nan)
        choice.run(experts.spec, slots, group, lambda: group.out.fill_(1.0))
        return group.out

    assert (run(1) == 1.0).all()
    with pytest.warns(RuntimeWarning, match=r"8 tokens at once: results differ"):
        assert (run(8) == 1.0).all()
    assert run(8).isnan().all(), "not accepted any more"
    assert (run(1) == 1.0).all()


def test_kernels_that_fail_later_give_way_to_torch(make_experts: Callable[..., Experts]) -> None:
    """Triton compiles again for arguments of another kind, long after the first use."""
    experts, faulty = make_experts(), Faulty("none")
    choice, slots, group = FusedChoice(faulty), torch.empty(0), group_of(experts, 1)
    choice.run(experts.spec, slots, group, lambda: group.out.fill_(7.0))
    faulty.problem = "compiler"
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        choice.run(experts.spec, slots, group, lambda: group.out.fill_(3.0))
    assert (group.out == 3.0).all()


def test_results_of_broken_inputs_are_no_verdict(make_experts: Callable[..., Experts]) -> None:
    experts, faulty = make_experts(), Faulty("nan")
    choice, slots, group = FusedChoice(faulty), torch.empty(0), group_of(experts, 1)
    choice.run(experts.spec, slots, group, lambda: group.out.fill_(torch.nan))
    assert choice.accepts(experts.spec, [1])


def test_a_broken_installation_of_triton_is_told_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('libcuda.so.1: wrong version')")
    for name in [
        name for name in sys.modules if name.split(".")[0] == "triton" or name.startswith("gpu_kernels.triton")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(gpu_kernels, "triton", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"cannot be loaded.*wrong version.*Install triton again"):
        assert load_fused() is None


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
