"""Compiled code on disk: new after any change of the sources it comes from, and not needed to run.

The tests copy the packages into a tree of their own, as an editable installation is, and start Python there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("scheduler", "cpu_kernels", "hybrimoe", "gpu_kernels", "yaml_rules")
# Each way to compile: module of the caller, its decorator, module of what it calls, and the decorator of that.
WRAPPERS = {
    "scheduler": ("scheduler.caller", "scheduler.compiled", "compiled", "scheduler.callee", "compiled"),
    "kernels": ("cpu_kernels.caller", "cpu_kernels.jit.compiled", "kernel", "cpu_kernels.jit.callee", "inline_kernel"),
    "layer call": (
        "hybrimoe.caller", "hybrimoe.runtime.layer_call.compiled", "_compiled", "cpu_kernels.callee", "inline_kernel",
    ),
}  # fmt: skip
HOME_OF = {"compiled": "scheduler.compiled", "inline_kernel": "cpu_kernels.jit.compiled"}
WORKER = """
import numpy as np
from cpu_kernels.callee import callee
from cpu_kernels.jit.compiled import Worker, kernel
from cpu_kernels.jit.primitives import call_worker, int64s_at

def work(call, thread):
    int64s_at(call, 1)[0] = callee(thread)

WORK = Worker(work)

@kernel
def run(worker, call):
    call_worker(worker, call, 1)

place = np.zeros(1, np.int64)
run(WORK.address, place.ctypes.data)
print(place[0])
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The packages once more, without compiled code."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "model"))
    return tmp_path


def write(tree: Path, module: str, text: str) -> None:
    (tree / module.replace(".", "/")).with_suffix(".py").write_text(text, encoding="utf-8")


def run(tree: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    given = inherited | {"PYTHONPATH": str(tree)} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env=given, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_change_in_another_module_compiles_again(tree: Path, name: str) -> None:
    caller, home, decorator, callee, inner = WRAPPERS[name]
    callee_text = f"from {HOME_OF[inner]} import {inner}\n\n@{inner}\ndef callee(x):\n    return x + %d\n"
    write(tree, callee, callee_text % 1)
    write(
        tree, caller,
        f"from {home} import {decorator}\nfrom {callee} import callee\n\n"
        f"@{decorator}\ndef caller(x):\n    return callee(x)\n",
    )  # fmt: skip
    code = f"from {caller} import caller; print(caller(1), sum(caller.stats.cache_hits.values()))"
    assert run(tree, code).stdout.split() == ["2", "0"]
    assert run(tree, code).stdout.split() == ["2", "1"], (
        f"numba {numba.__version__} no longer finds what it kept: see keep_on_disk in scheduler/compiled.py"
    )
    write(tree, callee, callee_text % 2)
    assert run(tree, code).stdout.split() == ["3", "0"], (
        f"numba {numba.__version__} took code of an old source: the stamp that keep_on_disk sets has no effect"
    )


def test_a_change_in_another_module_compiles_workers_again(tree: Path) -> None:
    callee = "from cpu_kernels.jit.compiled import inline_kernel\n\n@inline_kernel\ndef callee(x):\n    return x + %d\n"
    write(tree, "cpu_kernels.caller", WORKER)
    for added in (1, 2):
        write(tree, "cpu_kernels.callee", callee % added)
        assert run(tree, "import cpu_kernels.caller").stdout.split() == [str(1 + added)]


def test_nothing_can_be_kept_and_all_works(tree: Path) -> None:
    """A read-only installation and home: one warning, right results, no error (here even root may not write)."""
    for folder in [path for package in PACKAGES for path in (tree / package).rglob("*") if path.is_dir()]:
        (folder / "__pycache__").write_text("a file where the folder would be made")
    for package in PACKAGES:
        (tree / package / "__pycache__").write_text("a file where the folder would be made")
    code = (
        "import numpy as np, cpu_kernels as ck, scheduler\n"
        "import hybrimoe.runtime.layer_call.compiled\n"
        "d = ck.build_dispatch(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), 1)\n"
        "costs = scheduler.LayerCosts([4.0, 4.0], [1.0, 1.0], [1.0, 1.0], [True, False])\n"
        "print(d.rows.tolist(), scheduler.balance(costs).makespan_us)\n"
    )
    nowhere = "/proc/nowhere"
    done = run(tree, code, HOME=nowhere, XDG_CACHE_HOME=nowhere, HYBRIMOE_CACHE=nowhere, PYTHONWARNINGS="always")
    assert done.stdout.startswith("[0] ")
    assert done.stderr.count("NUMBA_CACHE_DIR") == 1, done.stderr


@pytest.mark.parametrize("setting", ["0", "1"])
def test_plain_python_runs_it_too(setting: str) -> None:
    code = (
        "import scheduler\n"
        "costs = scheduler.LayerCosts([4.0, 4.0], [1.0, 1.0], [1.0, 1.0], [True, False])\n"
        "print(scheduler.balance(costs).makespan_us)\n"
    )
    assert run(ROOT, code, NUMBA_DISABLE_JIT=setting).stdout.split() == ["2.0"]
