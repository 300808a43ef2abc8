"""The kernel of one launch: parity and order of programs in Triton's interpreter, and what is compiled of it."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpu_kernels import ExpertDtype, ExpertSpec
from cpu_kernels.format.layout import is_quantised

from .test_triton_kernels import ARCHITECTURES, Assembly, stack_bytes

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DTYPES = ("int4", "int8", "bfloat16", "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_launch_has_the_bits_of_several_in_any_order_of_programs(dtype: ExpertDtype) -> None:
    """In its own process: Triton decides between interpreter and compiler when kernels are defined."""
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(ROOT), str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, folder / "triton_single.py", dtype],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == 7 + len(singles(dtype)) + 2, done.stdout


def singles(dtype: ExpertDtype, capability: tuple[int, int] | None = (9, 0)) -> list[int]:
    """The numbers of the candidates of one launch."""
    from gpu_kernels.triton.cuts import candidates

    return [number for number, cuts in enumerate(candidates(dtype, 1, capability)) if cuts.single]


@functools.cache
def assembly(arch: int, dtype: ExpertDtype, number: int) -> Assembly:
    from gpu_kernels.triton import ahead

    spec = ExpertSpec(2048, 1024, dtype, has_bias=True)
    (kernel,) = ahead.compiled(("cuda", arch, 32), spec, 1, number)
    return Assembly(kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata.shared)


def every_kernel(arch: int, dtype: ExpertDtype) -> list[Assembly]:
    return [assembly(arch, dtype, number) for number in singles(dtype, divmod(arch, 10))]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loops_over_columns_are_those_of_several_launches(arch: int, dtype: ExpertDtype) -> None:
    """No TF32, nothing spilled, weights by 16 bytes, and no thread waits for another but between the loops."""
    for kernel in every_kernel(arch, dtype):
        assert "tf32" not in kernel.ptx
        assert stack_bytes(kernel.cubin) == 0
        over_columns = [loop for loop in kernel.loops if re.search(r"ld\.global\S*\.v4\.b32", loop)]
        over_columns = [loop for loop in over_columns if "div.rn" not in loop]  # that is the rounding of the input
        assert len(over_columns) == 2, "up's and down's"
        for loop in over_columns:
            assert "bar.sync" not in loop
            assert "shfl" not in loop
            assert "acquire" not in loop
            assert ("dp4a" in loop) == is_quantised(dtype)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_who_is_told_sees_what_was_written_before(arch: int, dtype: ExpertDtype) -> None:
    """Stores, barrier, release; first weights, acquire until it is full, barrier, activations: what `tickets` rests on,
    in every Triton."""
    for kernel in every_kernel(arch, dtype):
        ptx = kernel.ptx
        assert "%ctaid" not in ptx, "nothing follows from a program's place in the grid"
        assert "ld.global.nc" not in ptx
        assert len(re.findall(r"(?:atom|red)\.global\.gpu\.release\.add\.u32", ptx)) == 1
        assert len(re.findall(r"atom\.global\.gpu\.relaxed\.add\.u32", ptx)) == 1
        up, down = re.split(r"(?:atom|red)\.global\.gpu\.release", ptx)
        assert "bar.sync" in up.rpartition("st.global")[2], "a barrier between all stores and the release"
        acquire = r"(?:ld|atom)\.global\.gpu\.acquire\.\S+"
        assert len(re.findall(acquire, down)) == 2, "one look, and more in a loop"
        first, *_, last = re.split(acquire, down)
        assert re.search(r"ld\.global\S*\.v4\.b32", first), "weights are on their way before the wait"
        waited = last.partition("ld.global")[0]
        assert waited.count("bar.sync") >= 2, "behind the last look, and behind the wait"


def test_only_nvidias_cards_that_were_looked_at_may_choose_it() -> None:
    """One token an expert, and never by default."""
    from gpu_kernels.triton.cuts import candidates

    for dtype in DTYPES:
        for capability in (None, (7, 5)):
            assert not singles(dtype, capability)  # type: ignore[arg-type]
        for capability in ((8, 0), (9, 0), (12, 0)):
            found = candidates(dtype, 1, capability)  # type: ignore[arg-type]
            assert not found[0].single
            assert any(cuts.single for cuts in found)
            assert all(cuts.up.warps == cuts.down.warps for cuts in found if cuts.single)
            assert len({cuts.label for cuts in found}) == len(found)
            assert not any(cuts.single for cuts in candidates(dtype, 4, capability))  # type: ignore[arg-type]


def test_what_changes_from_call_to_call_is_not_compiled_in() -> None:
    from gpu_kernels.triton import single
    from gpu_kernels.triton.ahead import OURS, REALS

    kernel: Any = single.single_kernel
    for parameter in kernel.params:
        if parameter.is_constexpr or parameter.name in REALS:
            continue
        if parameter.name.endswith("_ptr"):
            assert parameter.do_not_specialize_on_alignment or parameter.name in OURS, parameter.name
        else:
            assert parameter.do_not_specialize, parameter.name
