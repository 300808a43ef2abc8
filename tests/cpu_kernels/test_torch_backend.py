"""The torch backend: bits that do not depend on threads, failures that leave nothing running, threads put back."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import cpu_kernels as ck
from cpu_kernels.backends.torch_backend import TorchBackend
from cpu_kernels.host.threads import torch_threads


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 5, 7, 12, 33])
def test_bits_do_not_depend_on_threads(make_pool, n_tokens) -> None:
    """Every expert gets every token: MKL sums 5 rows in another order on two threads."""
    pool = make_pool(ck.ExpertSpec(64, 32, "float32"), n_experts=3)
    index = np.tile(np.arange(3), (n_tokens, 1))
    x = np.random.default_rng(n_tokens).standard_normal((n_tokens, 64)).astype(np.float32)
    dispatch = ck.build_dispatch(index, np.full((n_tokens, 3), 0.3, np.float32), 3)
    results = []
    for lane_threads in (1, 2):
        torch.set_num_threads(lane_threads)
        results += [pool.run(backend, dispatch, x) for backend in (TorchBackend(1), TorchBackend())]
    assert all(np.array_equal(result, results[0]) for result in results)
    expected = pool.run(ck.get_backend("reference"), dispatch, x)
    assert ck.relative_error(torch.from_numpy(results[0]), torch.from_numpy(expected)) < 1e-5


def test_a_failure_is_raised_after_the_others_have_ended(make_pool, monkeypatch) -> None:
    pool = make_pool(ck.ExpertSpec(64, 32, "float32"), n_experts=2)
    dispatch = ck.build_dispatch(np.array([[0, 1]]), np.ones((1, 2), np.float32), 2)
    begun, ended, failing = threading.Event(), threading.Event(), threading.Event()

    def ffn(self: TorchBackend, spec: ck.ExpertSpec, record: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        if record.ctypes.data == pool.memory[0].ctypes.data:
            begun.wait(600)  # one that has not begun is not computed at all
            failing.set()
            raise ArithmeticError("bad expert")
        begun.set()
        failing.wait(600)
        ended.wait(0.05)  # long enough for a caller that does not wait to be gone
        ended.set()
        return x

    monkeypatch.setattr(TorchBackend, "ffn", ffn)
    backend = TorchBackend()
    backend.n_threads = 2
    with pytest.raises(ArithmeticError, match="bad expert"):
        pool.run(backend, dispatch, np.ones((1, 64), np.float32))
    assert ended.is_set()


def test_threads_asked_for_are_put_back_for_threads_to_come() -> None:
    torch.set_num_threads(2)
    seen: list[int] = []
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    worker = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    worker.start()
    worker.join()
    assert seen == [2]
    assert torch.get_num_threads() == 2


def test_threads_are_checked() -> None:
    with pytest.raises(ck.ThreadingError, match="asked for 0 threads"):
        ck.get_backend("torch", 0)
