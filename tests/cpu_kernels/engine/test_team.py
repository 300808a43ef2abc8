"""The team of threads: every task once, whoever comes; several callers; sleep and wake; fork, stop and exit."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from cpu_kernels.engine import team, waiting
from cpu_kernels.jit.compiled import Worker, kernel
from cpu_kernels.jit.primitives import int64s_at, take_ticket

# A call of the tests: its counter, sizes, and where results lie, on lines of their own.
TICKET, N_TASKS, WORK, COUNTS, CALL_WORDS = 0, 8, 9, 16, 24
N_PHASES, PHASES = 10, 11
MOST_TASKS = 512
MOST_THREADS = 5
"""More than this machine may have cores: the system then takes threads off them in the middle of a task."""


def _count(call_address: int, thread: int) -> None:
    """Worker: adds 1 to the count of each task, after some work."""
    call = int64s_at(call_address, CALL_WORDS)
    counts = int64s_at(call[COUNTS], MOST_TASKS)
    sums = int64s_at(call[COUNTS] + 8 * MOST_TASKS, MOST_TASKS)
    while True:
        task = take_ticket(call_address)
        if task >= call[N_TASKS]:
            return
        total = 0
        for i in range(call[WORK]):
            total += i * total ^ task
        counts[task] += 1
        sums[task] = total  # so that the work is not optimised away


def _phases(call_address: int, thread: int) -> None:
    """Worker: in each phase every task adds up the results of the phase before, which must all be there."""
    call = int64s_at(call_address, CALL_WORDS)
    n_tasks = call[N_TASKS]
    for phase in range(call[N_PHASES]):
        before = int64s_at(call[COUNTS] + 8 * phase * n_tasks, n_tasks)
        own = int64s_at(call[COUNTS] + 8 * (phase + 1) * n_tasks, n_tasks)
        place, n_done = call[PHASES] + phase * team.PHASE_BYTES, 0
        while True:
            task = take_ticket(place)
            if task >= n_tasks:
                break
            own[task] = before.sum() % 1_000_003 + task
            n_done += 1
        team.finish_tasks(place, n_done, n_tasks)


COUNT, PHASED = Worker(_count), Worker(_phases)


@kernel
def launch_many(worker: int, call_address: int, n_launches: int, n_threads: int) -> None:
    """n_launches of a worker that counts tasks, one right after the other."""
    for _ in range(n_launches):
        int64s_at(call_address, 1)[0] = 0
        team.run_on_team(worker, call_address, n_threads)


class Call:
    """A call of `_count`."""

    def __init__(self) -> None:
        self.room = np.zeros((2, MOST_TASKS), np.int64)  # counts, results
        self.counts = self.room[0]
        self.words = np.zeros(CALL_WORDS, np.int64)
        self.words[COUNTS] = self.room.ctypes.data

    def launch(self, n_launches: int, n_tasks: int, work: int, n_threads: int) -> None:
        """Raises AssertionError unless every task ran once in every launch."""
        self.words[N_TASKS], self.words[WORK] = n_tasks, work
        self.counts[:] = 0
        launch_many(COUNT.address, self.words.ctypes.data, n_launches, n_threads)
        assert (self.counts[:n_tasks] == n_launches).all()
        assert not self.counts[n_tasks:].any()


@pytest.fixture
def helpers() -> Iterator[None]:
    """As many helpers as the tests ask for at most; ended afterwards."""
    team.start_team(MOST_THREADS)
    yield
    team.stop_team()


@pytest.mark.parametrize("word", [None, waiting.SYSTEM, waiting.CLOCK], ids=["all", "no futex", "no clock"])
def test_thousands_of_launches_run_every_task_once(word: int | None) -> None:
    """Random sizes and numbers of threads, with pauses in which helpers fall asleep; also on lesser systems."""
    team.stop_team()
    if word is not None:
        kept, waiting.MEMORY[word // 8] = waiting.MEMORY[word // 8], 0
    team.start_team(MOST_THREADS)
    launch_at_random()
    team.stop_team()
    if word is not None:
        waiting.MEMORY[word // 8] = kept


def launch_at_random() -> None:
    drawn, call = random.Random(7), Call()
    for turn in range(300):
        call.launch(
            drawn.choice([1, 20]), drawn.randint(0, MOST_TASKS), drawn.choice([0, 1, 100, 2000]),
            drawn.randint(1, MOST_THREADS),
        )  # fmt: skip
        if turn % 60 == 0:
            time.sleep(0.003)  # longer than a helper spins


def test_callers_on_several_threads_share_the_team(helpers: None) -> None:
    """More callers than launches can be open at once, all at the same time; none waits for another."""
    failures: list[BaseException] = []

    def call_often(seed: int) -> None:
        drawn, call = random.Random(seed), Call()
        try:
            for _ in range(60):
                call.launch(10, drawn.randint(1, 64), drawn.choice([0, 50]), drawn.randint(1, MOST_THREADS))
        except AssertionError as error:
            failures.append(error)

    callers = [threading.Thread(target=call_often, args=(seed,)) for seed in range(waiting.N_LAUNCHES + 3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


@pytest.mark.parametrize("n_threads", range(1, MOST_THREADS + 1))
def test_phases_see_all_of_the_phase_before(helpers: None, n_threads: int) -> None:
    n_tasks, n_phases = 24, 200
    expected = np.zeros((n_phases + 1, n_tasks), np.int64)
    for phase in range(n_phases):
        expected[phase + 1] = expected[phase].sum() % 1_000_003 + np.arange(n_tasks)
    for _ in range(10):
        found = np.zeros_like(expected)
        room = np.zeros((n_phases + 1) * team.PHASE_BYTES // 8, np.int64)
        words = np.zeros(CALL_WORDS, np.int64)
        words[N_TASKS], words[N_PHASES], words[COUNTS] = n_tasks, n_phases, found.ctypes.data
        words[PHASES] = -(-room.ctypes.data // 64) * 64
        run(PHASED.address, words.ctypes.data, n_threads)
        np.testing.assert_array_equal(found, expected)


@kernel
def run(worker: int, call: int, n_threads: int) -> None:
    """One launch."""
    team.run_on_team(worker, call, n_threads)


def test_helpers_work() -> None:
    """With work for 20 ms a sleeping helper takes its share, whatever else runs here."""
    team.start_team(2)
    call, before = Call(), _helper_seconds()
    for _ in range(50):
        call.launch(1, 64, 1_000_000, 2)
        if _helper_seconds() > before + 0.02:
            break
    assert _helper_seconds() > before + 0.02
    team.stop_team()


def _helper_seconds() -> float:
    """CPU time of this process that its calling thread did not use."""
    return time.process_time() - time.thread_time()


def test_a_call_without_helpers_runs_alone() -> None:
    team.stop_team()
    Call().launch(5, 100, 10, MOST_THREADS)


def test_a_stopped_team_starts_again(helpers: None) -> None:
    for _ in range(3):
        team.stop_team()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("hybrimoe-cpu-")]
        team.start_team(3)
        Call().launch(5, 100, 10, 3)


FORK = """
import os, sys
import numpy as np, torch
import cpu_kernels as ck
from cpu_kernels.engine import team
spec = ck.ExpertSpec(512, 512, "int8")
record = np.zeros(spec.record_bytes, np.uint8)
w = torch.ones(512, 512)
ck.pack_expert(spec, ck.ExpertWeights(w, w, w), record)
d = ck.build_dispatch(np.zeros((64, 1), np.int64), np.ones((64, 1), np.float32), 1)
x = np.ones((64, 512), np.float32)
backend = ck.get_backend("numba", threads=int(sys.argv[1]))
def call():
    torch.ones(400, 400) @ torch.ones(400, 400)  # torch's pool is there too
    y = np.zeros((64, 512), np.float32)
    backend.run(spec, np.array([record.ctypes.data], np.uint64), np.zeros(1, np.int32), d, x, y)
    return y
here = call()
child = os.fork()
if child == 0:
    same = bool((call() == here).all())
    team.stop_team()
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bool((call() == here).all()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_call_after_fork_works() -> None:
    """GNU OpenMP ended such a child; here it starts helpers of its own."""
    threads = str(len(os.sched_getaffinity(0)))
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, threads]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "True"]), done.stderr


EXIT = """
from cpu_kernels.engine import team
team.start_team(4)
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "import os; os._exit(0)"])
def test_a_process_with_helpers_ends(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", EXIT + end], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_numba_starts_no_threads_of_its_own() -> None:
    """One pool: what computes experts must not wake another that spins beside it."""
    code = FORK[: FORK.index("child =")] + (
        "import numba\n"
        "try:\n    print(numba.threading_layer())\n"
        "except ValueError:\n    print('none')\n"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, "2"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["none"]
