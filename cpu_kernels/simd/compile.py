"""Compiles kernel modules: to assembly for any x86-64 or AArch64 CPU (tests), and to callable code for this one."""

import hashlib
import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from llvmlite import binding as llvm
from llvmlite import ir

from cpu_kernels.host.isa import BY_NAME, Isa, cpu_features, path_features
from cpu_kernels.jit.cache_dir import kernel_cache_dir
from cpu_kernels.jit.compiled import PACKAGE
from scheduler.compiled import source_stamp

_LOCK = threading.Lock()
_SOURCES = source_stamp(PACKAGE)  # so that an update never meets old kernels


class VectorKernel(Protocol):
    """A function written over `cpu_kernels.simd.vectors`; equal kernels are compiled once."""

    @property
    def symbol(self) -> str:
        """Name of the function in its module."""

    @property
    def name(self) -> str:
        """Of the kernel and all its parameters."""

    def build(self, isa: Isa) -> ir.Module:
        """LLVM module with the function."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Target:
    """A CPU to compile for, in LLVM's terms."""

    triple: str
    cpu: str
    features: str


def host_target(isa: Isa) -> Target:
    """This CPU, with the detected features as far as `isa` goes (the system may disable some, a path may be forced)."""
    features = path_features(isa, cpu_features())
    written = ",".join(f"{'+' if name in features else '-'}{name}" for name in sorted(cpu_features()))
    return Target(llvm.get_process_triple(), llvm.get_host_cpu_name() if written else "", written)


def assembly(kernel: VectorKernel, isa: Isa, target: Target) -> str:
    """Optimised assembly of a kernel for a CPU that need not be this one."""
    machine = _machine(target)
    return str(machine.emit_assembly(_optimised(kernel, isa, machine)))


@cache
def kernel_address(kernel: VectorKernel, isa_name: str) -> int:
    """Address of the compiled function for this CPU; compiled once, then read from the cache directory."""
    with _LOCK:
        return int(_engine(kernel, BY_NAME[isa_name]).get_function_address(kernel.symbol))


_ENGINES: list[llvm.ExecutionEngine] = []  # own the machine code, which lives as long as the process


def _engine(kernel: VectorKernel, isa: Isa) -> llvm.ExecutionEngine:
    target = host_target(isa)
    code = _object_code(kernel, isa, target)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(target))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)
    return engine


def _object_code(kernel: VectorKernel, isa: Isa, target: Target) -> bytes:
    place = _cache_file(kernel, isa, target)
    if place is not None and place.exists():
        return place.read_bytes()
    machine = _machine(target)
    code = bytes(machine.emit_object(_optimised(kernel, isa, machine)))
    if place is not None:
        partial = place.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(code)
        partial.replace(place)  # atomic: a second process sees all or nothing
    return code


def _cache_file(kernel: VectorKernel, isa: Isa, target: Target) -> Path | None:
    directory = kernel_cache_dir()
    if directory is None:
        return None
    parts = [target.triple, target.cpu, target.features, str(llvm.llvm_version_info), _SOURCES]
    stamp = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return directory / f"{kernel.name}-{isa.name}-{stamp}.o"


def _optimised(kernel: VectorKernel, isa: Isa, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    source = kernel.build(isa)
    source.triple = machine.triple
    source.data_layout = str(machine.target_data)
    module = llvm.parse_assembly(str(source))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False  # is written as such
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def _machine(target: Target) -> llvm.TargetMachine:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    family = llvm.Target.from_triple(target.triple)
    return family.create_target_machine(cpu=target.cpu, features=target.features, opt=3, jit=True)
