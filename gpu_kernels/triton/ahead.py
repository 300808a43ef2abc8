"""The kernels of decode steps compiled for a card that is not here, and what NVIDIA's assembler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cpu_kernels import ExpertSpec
from cpu_kernels.format.layout import is_quantised
from gpu_kernels.triton import attention, fused
from gpu_kernels.triton.cuts import Cuts, candidates
from gpu_kernels.triton.launch import COMPILED_WITH

OURS = ("slots_ptr", "x_ptr", "inner_ptr", "target_ptr", "given_ptr", "codes_ptr", "state_ptr")
"""Memory that torch gives or `fused` aligns: always to 16 bytes."""
POINTERS = {"rows_ptr": "*i64", "slots_ptr": "*i32", "slot_ids_ptr": "*i32", "offsets_ptr": "*i32"}
POINTERS |= {"state_ptr": "*i32"}
REALS = ("alpha", "gate_max", "act_max", "up_limit", "up_offset")
ADDRESS = re.compile(r"/\*[0-9a-f]{4,5}\*/")
LABEL = re.compile(r"^(\.L\w+):")
JUMP = re.compile(r"\bBRA[^`]*`\((\.L\w+)\)")


def cuts_on(target: tuple[str, int | str, int], spec: ExpertSpec, block: int, number: int = 0) -> Cuts:
    """The candidate of that number, 0 the default. target: backend, architecture (80 for 8.0), threads of a warp."""
    capability = divmod(int(target[1]), 10) if target[0] == "cuda" else None
    return candidates(spec.dtype, block, capability)[number]


def compiled(target: tuple[str, int | str, int], spec: ExpertSpec, block: int, number: int = 0) -> list[Any]:
    """Triton's results for the kernels of up and down, for programs of `block` tokens, cut as `cuts_on` says; or for
    the one that is both."""
    nvidia, chosen = target[0] == "cuda", cuts_on(target, spec, block, number)
    if chosen.single:
        return [_compiled(target, spec, *fused.single_variant(spec, chosen, nvidia))]
    return [
        _compiled(target, spec, *fused.up_variant(spec, block, chosen, nvidia)),
        _compiled(target, spec, *fused.down_variant(spec, block, chosen, nvidia)),
    ]


def _compiled(target: tuple[str, int | str, int], spec: ExpertSpec, kernel: Any, options: dict[str, Any]) -> Any:
    known = POINTERS | dict.fromkeys(REALS, "fp32")
    if is_quantised(spec.dtype):
        known |= {"x_ptr": "*i32", "inner_ptr": "*i32", "codes_ptr": "*i32"}
    names = kernel.arg_names
    constants = {name: value for name, value in options.items() if name in names}
    types = {
        name: "constexpr" if name in constants else known.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in OURS if name in names}
    at = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, types, constexprs=at, attrs=aligned), target=GPUTarget(*target),
        options={"num_warps": options["num_warps"], **COMPILED_WITH},
    )  # fmt: skip


def compiled_attention(
    target: tuple[str, int | str, int], size: int, dtype: str, *, group: int = 8, splits: int = 16, masked: bool = True
) -> Any:
    """Triton's result for a part of attention: heads of `size` values, a multiple of 16, `group` of them with the same
    keys. dtype: "bf16" or "fp32". Places and strides are multiples of 16, as Triton finds them when it launches."""
    padded, item = triton.next_power_of_2(size), 4 if dtype == "fp32" else 2
    constants = {
        "GROUP": group, "ROWS": max(attention.LEAST_HEADS, triton.next_power_of_2(group)), "SIZE": size,
        "PADDED": padded, "V_SIZE": size, "V_PADDED": padded, "KEYS": attention.keys_at_once(2 * padded * item),
        "SPLITS": splits, "MASKED": masked, "EXACT": dtype == "fp32",
    }  # fmt: skip
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
    known = pointers | {"mask_ptr": "*u8", "n_past_ptr": "*i64", "scale": "fp32"}
    kernel = attention.part_kernel
    types = {
        name: "constexpr" if name in constants else known.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    strides = [name for name in kernel.arg_names if re.fullmatch(r"[qkv]_(sequence|head|token)", name)]
    places = (kernel.arg_names.index(name) for name in (*pointers, "acc_ptr", "max_ptr", "sum_ptr", *strides))
    return triton.compile(
        ASTSource(kernel, types, constexprs=at, attrs={(place,): [["tt.divisibility", 16]] for place in places}),
        target=GPUTarget(*target), options=COMPILED_WITH,
    )  # fmt: skip


def nvidia_tool(name: str) -> Path:
    """A program of NVIDIA's that comes with Triton."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def assembly(cubin: bytes) -> list[str]:
    """The machine's instructions and labels, in order."""
    return [
        line for line in _told("nvdisasm", "-c", cubin=cubin).split("\n") if ADDRESS.search(line) or LABEL.match(line)
    ]


def loop_of(lines: list[str]) -> list[str]:
    """The instructions of the longest loop, that over the columns: from a label to the jump back to it."""
    return max(loops_of(lines), key=len, default=[])


def loops_of(lines: list[str]) -> list[list[str]]:
    """The instructions of each loop, in order."""
    labels, loops = {}, [[""]][:0]
    for number, line in enumerate(lines):
        if label := LABEL.match(line):
            labels[label[1]] = number
        elif (jump := JUMP.search(line)) and jump[1] in labels:
            loops.append(lines[labels[jump[1]] : number + 1])
    return [[line for line in loop if ADDRESS.search(line)] for loop in loops]


def resources(cubin: bytes) -> dict[str, int]:
    """REG: registers of a thread; STACK: bytes of local memory of one; SHARED: bytes of a program; and others."""
    told = _told("cuobjdump", "-res-usage", cubin=cubin)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", told.strip().rpartition("\n")[2])}


def _told(tool: str, option: str, *, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([nvidia_tool(tool), option, file], capture_output=True, text=True, check=True).stdout
