"""Compiles kernel modules: to assembly for any x86-64 or AArch64 CPU (tests), and to callable code for this one."""

import hashlib
import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llvmlite import binding as llvm

from cpu_kernels.cache_dir import kernel_cache_dir
from cpu_kernels.isa import BY_NAME, Isa, cpu_features, path_features
from cpu_kernels.simd.tiles import PANEL_NAME, build_module

_LOCK = threading.Lock()


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


def assembly(dtype: str, isa: Isa, target: Target) -> str:
    """Optimised assembly of `panel` for a CPU that need not be this one."""
    machine = _machine(target)
    return str(machine.emit_assembly(_optimised(dtype, isa, machine, False)))


@cache
def panel_address(dtype: str, isa_name: str, emulate_dot: bool = False) -> int:
    """Address of the compiled `panel` for this CPU; compiled once, then read from the cache directory."""
    with _LOCK:
        engine = _engine(isa_name, dtype, emulate_dot)
        return int(engine.get_function_address(PANEL_NAME))


_ENGINES: list[llvm.ExecutionEngine] = []  # own the machine code, which lives as long as the process


def _engine(isa_name: str, dtype: str, emulate_dot: bool) -> llvm.ExecutionEngine:
    isa = BY_NAME[isa_name]
    target = host_target(isa)
    code = _object_code(dtype, isa, target, emulate_dot)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(target))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)
    return engine


def _object_code(dtype: str, isa: Isa, target: Target, emulate_dot: bool) -> bytes:
    place = _cache_file(dtype, isa, target, emulate_dot)
    if place is not None and place.exists():
        return place.read_bytes()
    machine = _machine(target)
    code = bytes(machine.emit_object(_optimised(dtype, isa, machine, emulate_dot)))
    if place is not None:
        partial = place.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(code)
        partial.replace(place)  # atomic: a second process sees all or nothing
    return code


def _cache_file(dtype: str, isa: Isa, target: Target, emulate_dot: bool) -> Path | None:
    directory = kernel_cache_dir()
    if directory is None:
        return None
    parts = [target.triple, target.cpu, target.features, str(llvm.llvm_version_info), _source_hash(), str(emulate_dot)]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return directory / f"{dtype}-{isa.name}-{name}.o"


@cache
def _source_hash() -> str:
    """Hash of the sources that determine the code, so that an update never meets old kernels."""
    here = Path(__file__).parent
    sources = [here / "tiles.py", here / "vectors.py", here / "compile.py"]
    sources += [here.parent / "isa.py", here.parent / "layout.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _optimised(dtype: str, isa: Isa, machine: llvm.TargetMachine, emulate_dot: bool) -> llvm.ModuleRef:
    source = build_module(dtype, isa, emulate_dot)
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
