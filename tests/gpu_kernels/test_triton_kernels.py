"""The fused Triton kernels: parity in Triton's interpreter, and compilation for NVIDIA and AMD without a device."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_kernels
from cpu_kernels import Activation, ExpertDtype, ExpertSpec, relative_error
from cpu_kernels.format.layout import is_quantised
from gpu_kernels import TorchAccelerator
from gpu_kernels.fused_choice import FusedChoice, Group, load_fused
from hybrimoe.runtime.startup.measure import KERNEL_TOKENS

from .conftest import Experts

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("dtypes", ["int4", "int8", "bfloat16", "float32"])
def test_parity_in_the_interpreter(dtypes: str) -> None:
    """In its own process: Triton decides between interpreter and compiler when kernels are defined."""
    script = Path(__file__).with_name("triton_parity.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, script, dtypes], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    from gpu_kernels.triton.cuts import BLOCK_TOKENS, candidates

    other_cuts = sum(len(candidates(dtypes, block, None)) - 1 for block in BLOCK_TOKENS)  # type: ignore[arg-type]
    assert done.stdout.count("ok") == 12 + other_cuts, done.stdout


@dataclass(frozen=True)
class Assembly:
    """What Triton makes of one kernel for an NVIDIA architecture."""

    ptx: str
    cubin: bytes
    shared_bytes: int

    @property
    def loops(self) -> list[str]:
        """The code between each label and a jump back to it."""
        lines, labels, found = self.ptx.split("\n"), {}, []
        for number, line in enumerate(lines):
            if label := re.match(r"(\$L\w+):", line):
                labels[label[1]] = number
            if (jump := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)) and jump[1] in labels:
                found.append("\n".join(lines[labels[jump[1]] : number]))
        return found

    @property
    def main_loop(self) -> str:
        """The longest loop: that over the columns."""
        return max(self.loops, key=len)


def compiled(target: tuple[str, int | str, int], spec: ExpertSpec, block: int, number: int = 0) -> list[Any]:
    """Triton's results for both kernels, cut as the candidate of that number."""
    from gpu_kernels.triton import ahead

    return ahead.compiled(target, spec, block, number)


@functools.cache
def assembly(arch: int, dtype: ExpertDtype, block: int, number: int = 0) -> list[Assembly]:
    """Of up and down."""
    found = compiled(("cuda", arch, 32), ExpertSpec(2048, 1024, dtype), block, number)
    return [Assembly(kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata.shared) for kernel in found]


def instructions(cubin: bytes) -> list[str]:
    """The machine's instructions, in order."""
    from gpu_kernels.triton import ahead

    return [line for line in ahead.assembly(cubin) if ahead.ADDRESS.search(line)]


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory that each thread has: registers that did not suffice."""
    from gpu_kernels.triton import ahead

    return ahead.resources(cubin)["STACK"]


ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""Of shared memory that a program may take (CUDA C++ Programming Guide, compute capabilities)."""
EVERY_BLOCK = [(arch, block) for arch in ARCHITECTURES for block in (1, 128)] + [(90, 4), (90, 16), (90, 64)]
"""All blocks of tokens for one architecture, the smallest and the largest for the others."""


@needs_triton
@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("dtype", ["int4", "bfloat16"])
def test_kernels_compile_for_amd_without_a_device(dtype: ExpertDtype, block: int) -> None:
    try:
        kernels = compiled(("hip", "gfx942", 64), ExpertSpec(2048, 1024, dtype, has_bias=True), block)
    except Exception as error:
        if "ld.lld not found" in str(error):
            pytest.skip("this Triton comes without the linker for AMD")
        raise
    for kernel in kernels:
        assert "hsaco" in kernel.asm


@needs_triton
@pytest.mark.parametrize(("arch", "block"), EVERY_BLOCK)
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
def test_no_product_is_rounded_to_tf32_and_no_register_spilled(arch: int, dtype: ExpertDtype, block: int) -> None:
    """Results are promised in float32, or in the integers of the CPU's kernels: TF32 would round to 10 bits."""
    for kernel in assembly(arch, dtype, block):
        assert "tf32" not in kernel.ptx
        assert stack_bytes(kernel.cubin) == 0
        assert kernel.shared_bytes <= SHARED_KIB[arch] << 10


@needs_triton
@pytest.mark.parametrize(("arch", "block"), [(arch, block) for arch, block in EVERY_BLOCK if block < 16])
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
def test_few_tokens_read_16_bytes_at_a_time_and_no_thread_waits(arch: int, dtype: ExpertDtype, block: int) -> None:
    """The loop over columns reads weights by 16 bytes, and its sums stay in registers: one exchange, after the loop."""
    for kernel in assembly(arch, dtype, block):
        loop = kernel.main_loop
        assert "ld.global" in loop
        assert re.search(r"ld\.global\S*\.v4\.b32", loop)
        assert "bar.sync" not in loop
        assert "shfl" not in loop
        assert ("dp4a" in loop) == is_quantised(dtype)


@needs_triton
@pytest.mark.parametrize(("arch", "block"), [(arch, block) for arch, block in EVERY_BLOCK if block >= 16])
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16"])
def test_many_tokens_take_tensor_cores(arch: int, dtype: ExpertDtype, block: int) -> None:
    operands = r"mma\S*\.s32\.s8" if is_quantised(dtype) else r"mma\S*\.bf16"
    for kernel in assembly(arch, dtype, block):
        assert re.search(operands, kernel.main_loop)


@needs_triton
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
def test_every_cut_keeps_its_sums_in_registers(dtype: ExpertDtype, block: int) -> None:
    """What may be chosen on a card keeps the promises of the default."""
    from gpu_kernels.triton.cuts import candidates

    for number in range(1, len(candidates(dtype, block, (9, 0)))):
        for kernel in assembly(90, dtype, block, number):
            assert stack_bytes(kernel.cubin) == 0
            assert re.search(r"ld\.global\S*\.v4\.b32", kernel.main_loop)
            assert "bar.sync" not in kernel.main_loop
            assert "tf32" not in kernel.ptx


@needs_triton
@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
def test_no_load_of_weights_waits_for_the_one_before(arch: int, dtype: ExpertDtype) -> None:
    """NVIDIA's assembler once put the arithmetic of a line between the loads of two, to save registers: one load of a
    thread was under way, and a card gave half its rate."""
    arithmetic = r"IDP" if is_quantised(dtype) else r"FFMA"
    for kernel in assembly(arch, dtype, 1):
        runs, run = [], 0
        for line in instructions(kernel.cubin):
            if "LDG" in line and ".128" in line:
                run += 1
            elif re.search(arithmetic, line):
                runs, run = [*runs, run], 0
        assert max(runs) >= 4
        assert all(run == 0 or run >= 4 for run in runs), runs


@needs_triton
def test_no_kernel_overlaps_where_triton_cannot_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_kernels.triton import cuts

    monkeypatch.setattr(cuts, "CAN_OVERLAP", False)
    assert not any(cut.overlap for cut in cuts.candidates("int4", 1, (9, 0)))
    monkeypatch.setattr(cuts, "CAN_OVERLAP", True)
    assert all(cut.overlap for cut in cuts.candidates("int4", 1, (9, 0)) if not cut.single)


@needs_triton
def test_kernels_read_weights_while_the_one_before_still_runs() -> None:
    """The wait stands after the first loads of weights. Where nothing is prepared, `up` starts after all work before
    it: that is another's, which does not know of being overlapped."""
    from gpu_kernels.triton import cuts, fused
    from gpu_kernels.triton.launch import CAN_OVERLAP

    if not CAN_OVERLAP:
        pytest.skip("kernels of this Triton cannot wait for the one before them")
    for kernel in assembly(90, "int4", 1):
        before, _, after = kernel.ptx.rpartition("griddepcontrol.wait")
        assert before.count("griddepcontrol.wait") == 1, "programs without work wait too, or the end would say too much"
        assert re.search(r"ld\.global\S*\.v4\.b32", before)
        assert "dp4a" in after
        assert "dp4a" not in before
    assert all("griddepcontrol" not in kernel.ptx for kernel in assembly(80, "int4", 1))
    for dtype, block, early in (
        ("int4", 1, True),
        ("bfloat16", 1, False),
        ("int8", 4, True),
        ("float32", 4, False),
    ):
        spec = ExpertSpec(64, 64, dtype)  # type: ignore[arg-type]
        overlapping = cuts.candidates(spec.dtype, block, (9, 0))[0]
        assert ("launch_pdl" in fused.up_variant(spec, block, overlapping, nvidia=True)[1]) == early
        assert "launch_pdl" in fused.down_variant(spec, block, overlapping, nvidia=True)[1]


@needs_triton
def test_what_changes_from_call_to_call_is_not_compiled_in() -> None:
    """Only dtype, activation, bias and block decide what is compiled: one start compiles all that a session needs."""
    from gpu_kernels.triton import few, formats, many
    from gpu_kernels.triton.ahead import OURS

    constants_and_reals = {"alpha", "gate_max", "act_max", "up_limit", "up_offset"}
    for kernel in (
        few.up_kernel, few.down_kernel, many.up_tile_kernel, many.down_tile_kernel, formats.prepare_kernel,
    ):  # fmt: skip
        for parameter in kernel.params:
            if parameter.is_constexpr or parameter.name in constants_and_reals:
                continue
            if parameter.name.endswith("_ptr"):
                assert parameter.do_not_specialize_on_alignment or parameter.name in OURS, parameter.name
            else:
                assert parameter.do_not_specialize, parameter.name


@needs_triton
@pytest.mark.parametrize("n_tokens", [1, 2, 4, 5, 16, 17, 64, 65, 1000])
def test_blocks_cover_the_tokens(n_tokens: int) -> None:
    from gpu_kernels.triton import fused

    assert fused.block_tokens([65, 40, 40, 40]) == 64, "one expert of many does not double what the others take"
    block = fused.block_tokens([1, n_tokens])
    assert block in fused.blocks()
    assert block >= min(n_tokens, 64)
    assert fused.blocks() == KERNEL_TOKENS, "what a session compiles at its start"


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
