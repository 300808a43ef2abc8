"""Idle threads of parallel regions sleep, unless somebody wants otherwise."""

import os
import subprocess
import sys

import pytest

from hybrimoe.cli.waiting import set_wait_policy


def test_threads_sleep_by_default() -> None:
    environment: dict[str, str] = {}
    set_wait_policy(["generate", "-p", "x"], environment)
    assert environment == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}])
def test_the_users_choice_stays(chosen: dict[str, str]) -> None:
    environment = dict(chosen)
    set_wait_policy(["chat"], environment)
    assert environment == chosen


def test_kernels_are_measured_as_their_peers_are() -> None:
    environment: dict[str, str] = {}
    set_wait_policy(["bench", "kernels", "--quick"], environment)
    assert environment == {}
    set_wait_policy(["bench", "decode"], environment)
    assert environment == {"OMP_WAIT_POLICY": "passive"}


def test_the_program_chooses_before_torch_is_there() -> None:
    code = (
        "import os, sys\n"
        "from hybrimoe.cli import app\n"
        "app.LazyGroup.main = lambda *a, **k: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\n"
        "app.main()"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["passive", "False"]
