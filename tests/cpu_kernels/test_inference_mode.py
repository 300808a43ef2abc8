"""Generation runs in torch's inference mode, which a backend's own threads are not in."""

import numpy as np
import pytest
import torch

import cpu_kernels as ck
from cpu_kernels.host.threads import resolve_threads


@pytest.mark.parametrize("threads", [1, 2])
def test_the_torch_backend_runs_for_a_caller_in_inference_mode(make_pool, route, threads: int) -> None:
    if threads > resolve_threads(None):
        pytest.skip("this machine has one core")
    spec = ck.ExpertSpec(64, 32, "float32")
    pool = make_pool(spec)
    dispatch, hidden = route(6, 2, 4, 64)
    expected = pool.run(ck.get_backend("torch", threads=1), dispatch, hidden)
    with torch.inference_mode():
        found = pool.run(ck.get_backend("torch", threads=threads), dispatch, hidden)
    assert np.array_equal(found, expected, equal_nan=True)
