"""What `hybrimoe doctor` says about the machine: CPU, instruction set, threads, accelerators, memory, disk, caches."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

import cpu_kernels as ck
from cpu_kernels.host.isa import ENV_ISA, detect
from cpu_kernels.host.threads import physical_cores, resolve_threads
from cpu_kernels.jit import cache_dir
from gpu_kernels import AcceleratorError, open_accelerator
from gpu_kernels.devices import auto_device, indexed, memory_info
from gpu_kernels.graphs import graphs_of
from gpu_kernels.page_locked import page_locked
from gpu_kernels.tuning import Timings, setting_of
from gpu_kernels.waiting import wait_for_stream
from hybrimoe.errors import HybriMoEError
from hybrimoe.machine import bytecode
from hybrimoe.machine.bytecode import PACKAGES
from hybrimoe.machine.check import Check, guarded
from hybrimoe.machine.facts import cpu_model
from hybrimoe.machine.memory import available_bytes, total_bytes
from yaml_rules.errors import YamlRulesError

GIB = 2**30
LEAST_MEMORY_GIB = 1.0  # the demo model with torch and transformers takes about half of it
LEAST_DISK_GIB = 2.0
LEAST_FREE_SHARE = 0.5
"""Of an accelerator's memory: with less, others use it, too."""
LOCKED_BYTES = 1 << 20
"""That are page-locked for a trial."""
SELDOM_SHARE = 0.5
"""Of the modules, that a start of a model does not import: missing bytecode of so many may be theirs."""
LEAST_CAPABILITY = 7, 0
"""Of NVIDIA cards for which Triton compiles."""


def checks() -> Iterator[Check]:
    """A line for each part of the machine."""
    yield _cpu()
    yield guarded("instruction set", _isa, (ck.IsaError,), f"unset {ENV_ISA}, or set it to a path that this CPU has")
    yield guarded("threads", _threads, (ck.ThreadingError,), "see the message; one thread always works: --threads 1")
    yield _accelerator()
    yield from _card_memory()
    yield from _page_lock()
    yield from _card_kernels()
    yield _memory()
    yield _disk()
    yield _bytecode(Path(__file__).parents[2])
    yield _kernel_cache()
    yield _packed_cache()
    yield _profile()


def _cpu() -> Check:
    return Check("CPU", "ok", f"{cpu_model()}, {physical_cores()} physical cores usable, {os.cpu_count()} logical")


def _isa() -> Check:
    choice = detect()
    rejected = "".join(f"; not {path}: {reason}" for path, reason in choice.rejected)
    found = f"{choice.isa.name}: {choice.reason}{rejected}"
    if choice.isa.name == "portable":
        return Check("instruction set", "warn", found, "right but slow: this CPU has no vector path of its own here")
    return Check("instruction set", "ok", found)


def _threads() -> Check:
    count = resolve_threads()
    return Check("threads", "ok", f"{count}, torch {torch.get_num_threads()}")


def _accelerator() -> Check:
    try:
        device = open_accelerator("auto")
    except (AcceleratorError, RuntimeError) as error:  # torch's own failures to start a device are RuntimeErrors
        return Check("accelerator", "warn", f"{error}", "experts run on the CPU until the device works")
    if device is None:
        return Check("accelerator", "info", "none: experts run on the CPU", "for a trial: --accelerator emulated")
    device.close()
    count, kind = torch.accelerator.device_count(), torch.accelerator.current_accelerator()
    assert kind is not None
    try:
        _compute_a_little(device.device)
    except (AcceleratorError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        return Check("accelerator", "warn", f"{device.name} computes nothing: {reason}", _what_to_do(reason))
    every = ", ".join(f"{kind.type}:{index}" for index in range(count))
    return Check("accelerator", "ok", f"{count} x {kind.type}", f"to use all: accelerator: [{every}]" * (count > 1))


NO_KERNELS = "no kernel image"
"""In CUDA's error of a card for which torch was not built."""


def _compute_a_little(device: torch.device) -> None:
    """Raises RuntimeError where a device does not, or what it computes is wrong."""
    doubled = torch.arange(8, device=device) * 2
    wait_for_stream(device, "a multiplication")
    if doubled.cpu().tolist() != list(range(0, 16, 2)):
        raise RuntimeError("it computes wrong numbers")


def _what_to_do(reason: str) -> str:
    if NO_KERNELS in reason:
        return "the card is too old, or too new, for this torch: install one that has it, or --accelerator none"
    return "experts run on the CPU until the device works: --accelerator none"


def _card_memory() -> Iterator[Check]:
    """What other programs have left of the memory of the accelerator that "auto" means."""
    device = auto_device()
    if device is None:
        return
    try:
        free, total = memory_info(indexed(device))
    except (AcceleratorError, RuntimeError):
        return  # the line before says why
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if free < LEAST_FREE_SHARE * total:
        advice = "other programs have the rest: end them, or expect fewer slots (memory.gpu_experts)"
        yield Check("accelerator memory", "warn", found, advice)
    else:
        yield Check("accelerator memory", "ok", found)


def _page_lock() -> Iterator[Check]:
    """Whether memory can be page-locked, from which an accelerator copies by itself."""
    if auto_device() is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the refusal, which is told here
        is_locked = torch.from_numpy(page_locked(LOCKED_BYTES)).is_pinned()
    if is_locked:
        yield Check("page-locked memory", "ok", f"{LOCKED_BYTES >> 20} MiB locked")
        return
    advice = "transfers are copied once more: raise ulimit -l; in WSL2 the memory of the virtual machine (.wslconfig)"
    yield Check("page-locked memory", "warn", "the system refuses to lock pages", advice)


def _card_kernels() -> Iterator[Check]:
    """What sessions have chosen for the card that "auto" means; nothing where there is none with fused kernels."""
    device = auto_device()
    if device is None or graphs_of(device) is None or importlib.util.find_spec("triton") is None:
        return
    capability = getattr(torch.get_device_module(device), "get_device_capability", lambda _: None)(device)
    if capability is not None and tuple(capability) < LEAST_CAPABILITY:
        found = f"the card is too old for them: compute capability {capability[0]}.{capability[1]}, 7.0 needed"
        yield Check("card's kernels", "warn", found, "torch computes experts there, right but slower")
        return
    timings = Timings.of(setting_of(device))
    if timings.us:
        found = "; ".join(f"{kernel}: {label}" for kernel, label in sorted(timings.best().items()))
        yield Check("card's kernels", "ok", f"timed here: {found}")
    else:
        yield Check("card's kernels", "info", "not timed here yet", "the first session on the card does, in seconds")


def _memory() -> Check:
    available, total = available_bytes(), total_bytes()
    found = f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if total < psutil.virtual_memory().total:
        found += " that this control group may use"
    if available < LEAST_MEMORY_GIB * GIB:
        return Check("memory", "warn", found, "close other programs; `hybrimoe plan MODEL` says what a model needs")
    return Check("memory", "ok", found)


def _disk() -> Check:
    place = cache_dir.cache_home()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free at {place}"
    if free < LEAST_DISK_GIB * GIB:
        return Check("disk", "warn", found, f"make room, or set {cache_dir.ENV_CACHE} to a larger disk")
    return Check("disk", "ok", found)


def _bytecode(root: Path) -> Check:
    """Whether Python finds the packages under `root` compiled, or compiles all modules of them at each start."""
    sources = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    missing = sum(not Path(importlib.util.cache_from_source(path)).exists() for path in sources)
    found = f"{len(sources) - missing} of {len(sources)} modules have bytecode beside them"
    if missing <= SELDOM_SHARE * len(sources) or not (sys.dont_write_bytecode or not os.access(root, os.W_OK)):
        return Check("bytecode", "ok", found)
    kept = bytecode.folder()
    if cache_dir.is_writable(kept):
        return Check("bytecode", "ok", f"{found}, that of others is kept in {kept}")
    folders = " ".join(str(root / package) for package in PACKAGES)
    advice = f"each start compiles the others, 0.7 s: python -m compileall -q {folders}"
    return Check("bytecode", "warn", f"{found}, and none can be kept in {kept}", advice)


def _kernel_cache() -> Check:
    directory = cache_dir.kernel_cache_dir()
    if directory is None:
        tried = ", ".join(map(str, cache_dir.candidate_dirs()))
        advice = f"every start compiles again (seconds): set {cache_dir.ENV_CACHE} to a directory you may write to"
        return Check("kernel cache", "warn", f"not writable: {tried}", advice)
    return Check("kernel cache", "ok", str(directory))


def _packed_cache() -> Check:
    root = cache_dir.cache_home()
    if not cache_dir.is_writable(root):
        advice = f"models are packed at each start (slow): set {cache_dir.ENV_CACHE} to a directory you may write to"
        return Check("packed models", "warn", f"not writable: {root}", advice)
    return Check("packed models", "ok", str(root))


def _profile() -> Check:
    from hybrimoe.machine.disks import disk_text
    from hybrimoe.machine.profiles import open_hardware, profile_path

    path = profile_path()
    if not path.is_file():
        return Check("calibration", "info", "none: a session measures its shapes briefly", "hybrimoe calibrate")
    try:
        profile = open_hardware(path)
    except (YamlRulesError, ValueError, OSError, HybriMoEError) as error:
        return Check("calibration", "warn", f"{path}: {error}", "hybrimoe calibrate writes it anew")
    found = f"{path}: {profile.name}, {profile.provenance}"
    if profile.disk is None:
        return Check("calibration", "ok", f"{found}, without the disk")
    return Check("calibration", "ok", f"{found}; disk {disk_text(profile.disk)}")


def kernels() -> Check:
    """An int4 expert, run by the compiled kernels and compared with the reference."""
    return guarded("kernels", _kernels, (ck.KernelError, OSError, RuntimeError), "please report this with the output")


def _kernels() -> Check:
    spec = ck.ExpertSpec(128, 96, "int4")
    rng = np.random.default_rng(0)
    up, gate, down = (
        torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((96, 128),) * 2 + ((128, 96),)
    )
    record = np.zeros(spec.record_bytes, np.uint8)
    ck.pack_expert(spec, ck.ExpertWeights(up, down, gate), record)
    hidden = rng.standard_normal((2, spec.hidden)).astype(np.float32)
    dispatch = ck.build_dispatch(np.zeros((2, 1), np.int64), np.ones((2, 1), np.float32), 1)
    work = (spec, np.array([record.ctypes.data], np.uint64), np.zeros(1, np.int32), dispatch, hidden)
    fast, slow = (np.zeros((2, spec.hidden), np.float32) for _ in range(2))
    ck.get_backend("auto").run(*work, fast)
    ck.get_backend("reference").run(*work, slow)
    error = ck.relative_error(torch.from_numpy(fast), torch.from_numpy(slow))
    found = f"int4 expert agrees with the reference: relative error {error:.1e}, allowed {ck.tolerance(spec):.0e}"
    if error > ck.tolerance(spec):
        return Check("kernels", "broken", found.replace("agrees", "disagrees"), f"set {ENV_ISA}=portable and report it")
    return Check("kernels", "ok", found)
