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

from scheduler.compiled import CodeFiles, once_for_all_values

ROOT = Path(__file__).parents[2]
PACKAGES = ("scheduler", "cpu_kernels", "hybrimoe", "gpu_kernels", "yaml_rules")
# Each way to compile: module of the caller, its decorator, module of what it calls, and the decorator of that.
WRAPPERS = {
    "scheduler": ("scheduler.caller", "scheduler.compiled", "compiled", "scheduler.callee"),
    "kernels": ("cpu_kernels.caller", "cpu_kernels.jit.compiled", "kernel", "cpu_kernels.jit.callee"),
    "layer call": ("hybrimoe.caller", "hybrimoe.runtime.layer_call.compiled", "with_gil", "cpu_kernels.jit.callee"),
}
CALLEES = {
    "scheduler.callee": "from scheduler.compiled import compiled\n\n@compiled\ndef callee(x):\n    return x + {}\n",
    "cpu_kernels.jit.callee": (
        "from cpu_kernels.jit.compiled import inline_kernel\n\n@inline_kernel\ndef callee(x):\n    return x + {}\n"
    ),
}
WORKER = """
import numpy as np
from cpu_kernels.jit.callee import callee
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
print('worker', place[0])
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


@pytest.mark.slow
def test_a_change_in_another_module_compiles_again(tree: Path) -> None:
    """What a caller returns tells which source of its callee it was compiled with."""
    script = "import cpu_kernels.worker\n"
    write(tree, "cpu_kernels.worker", WORKER)
    for name, (caller, home, decorator, callee) in WRAPPERS.items():
        write(
            tree, caller,
            f"from {home} import {decorator}\nfrom {callee} import callee\n\n"
            f"@{decorator}\ndef caller(x):\n    return callee(x)\n",
        )  # fmt: skip
        script += f"from {caller} import caller\nprint({name!r}, caller(1), sum(caller.stats.cache_hits.values()))\n"
    for module, text in CALLEES.items():
        write(tree, module, text.format(1))
    new, kept = "the stamp that keep_on_disk sets has no effect", "what was kept is not found: see keep_on_disk"
    numba_says = f"numba {numba.__version__}: "
    assert run(tree, script).stdout.splitlines() == ["worker 2", "scheduler 2 0", "kernels 2 0", "layer call 2 0"]
    again = run(tree, script).stdout.splitlines()
    assert again == ["worker 2", "scheduler 2 1", "kernels 2 1", "layer call 2 1"], numba_says + kept
    write(tree, "cpu_kernels.jit.callee", CALLEES["cpu_kernels.jit.callee"].format(2))
    changed = run(tree, script).stdout.splitlines()
    assert changed == ["worker 3", "scheduler 2 1", "kernels 3 0", "layer call 3 0"], numba_says + new
    write(tree, "scheduler.callee", CALLEES["scheduler.callee"].format(2))
    changed = run(tree, script).stdout.splitlines()
    assert changed == ["worker 3", "scheduler 3 0", "kernels 3 1", "layer call 3 0"], numba_says + new


def test_code_that_two_processes_keep_under_one_name_is_not_mixed_up(tmp_path: Path) -> None:
    first, second = (CodeFiles(str(tmp_path), "function", "stamp") for _ in range(2))
    second._load_index = dict  # it looked when there was nothing, and takes the name that the first one takes
    first.save("int", "code for int")
    index = (tmp_path / "function.nbi").read_bytes()
    second.save("float", "code for float")
    (tmp_path / "function.nbi").write_bytes(index)  # the first one was the last to write it
    assert first.load("int") is None
    assert first.load("float") is None
    first.save("int", "code for int")
    assert first.load("int") == "code for int"


def test_a_value_in_a_call_needs_no_code_of_its_own() -> None:
    """Numba compiles for the type of the literal; each function would be there twice."""
    inner = once_for_all_values(numba.njit(lambda x, below, flag: below if flag else x))
    outer = numba.njit(lambda x: inner(x, -1, True) + inner(x, x, x > 0) + inner(x, flag=False, below=x))
    assert outer(3) == 5
    assert len(inner.signatures) == 1


@pytest.mark.slow
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
        "print(d.rows.tolist(), scheduler.balance(costs, policy='static').makespan_us)\n"
    )
    nowhere = "/proc/nowhere"
    done = run(tree, code, HOME=nowhere, XDG_CACHE_HOME=nowhere, HYBRIMOE_CACHE=nowhere, PYTHONWARNINGS="always")
    assert done.stdout.split() == ["[0]", "4.0"]
    assert done.stderr.count("NUMBA_CACHE_DIR") == 1, done.stderr


@pytest.mark.parametrize("setting", ["0", "1"])
def test_plain_python_runs_it_too(setting: str) -> None:
    code = (
        "import scheduler\n"
        "costs = scheduler.LayerCosts([4.0, 4.0], [1.0, 1.0], [1.0, 1.0], [True, False])\n"
        "print(scheduler.balance(costs).makespan_us)\n"
    )
    assert run(ROOT, code, NUMBA_DISABLE_JIT=setting).stdout.split() == ["2.0"]


WITHOUT_SCIPY = """
import sys
import scheduler.compiled
assert not {name for name in sys.modules if name.split(".")[0] == "scipy"}
import numba
import numpy as np
assert numba.njit(lambda a, b: a @ b)(np.eye(2), 3 * np.eye(2))[0, 0] == 3
assert numba.njit(lambda a: np.cov(a))(np.eye(2)).shape == (2, 2)
"""


def test_numba_comes_without_scipy_until_somebody_needs_it() -> None:
    pytest.importorskip("scipy", reason="not installed: nothing to leave out")
    result = subprocess.run([sys.executable, "-c", WITHOUT_SCIPY], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
