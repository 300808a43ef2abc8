"""Idle threads of parallel regions sleep, unless one job has the machine to itself or somebody wants otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybrimoe.cli.views.waiting import others_run, set_wait_policy


def chosen(words: list[str], busy: bool, **environment: str) -> dict[str, str]:
    set_wait_policy(words, environment, lambda: busy)
    return environment


@pytest.mark.parametrize("command", ["generate", "bench", "calibrate", "trace"])
def test_one_job_spins_on_an_idle_machine_and_sleeps_on_a_busy_one(command: str) -> None:
    assert chosen([command, "x"], busy=False) == {}
    assert chosen([command, "x"], busy=True) == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("words", [["chat"], ["serve", "--port", "80"], ["explain"], []])
def test_what_lasts_sleeps(words: list[str]) -> None:
    assert chosen(words, busy=False) == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("choice", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}])
def test_the_users_choice_stays(choice: dict[str, str]) -> None:
    assert chosen(["chat"], busy=True, **choice) == choice


def test_kernels_are_measured_as_their_peers_are() -> None:
    assert chosen(["bench", "kernels", "--quick"], busy=True) == {}


@pytest.mark.parametrize(
    ("text", "busy"),
    [("0.5 0.4 0.3 1/300 12", False), ("0.5 0.4 0.3 2/300 12", True), ("9.0 9.0 9.0 17/300 12", True), ("?", True)],
)
def test_other_work_is_what_runs_now(tmp_path: Path, text: str, busy: bool) -> None:
    (tmp_path / "loadavg").write_text(text)
    assert others_run(tmp_path / "loadavg") is busy


def test_a_system_that_does_not_say_counts_as_busy(tmp_path: Path) -> None:
    assert others_run(tmp_path / "absent") is True


def test_the_program_chooses_before_torch_is_there() -> None:
    code = (
        "import os, sys\n"
        "from hybrimoe.cli import app\n"
        "sys.argv = ['hybrimoe', 'chat']\n"
        "app.LazyGroup.main = lambda *a, **k: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\n"
        "app.main()"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["passive", "False"]
