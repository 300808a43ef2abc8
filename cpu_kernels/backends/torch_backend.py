"""The `torch` backend: torch matrix products; runs every spec, custom activations included, on every machine."""

from collections.abc import Callable
from concurrent.futures import wait
from functools import cached_property

import numpy as np
import torch

from cpu_kernels.backends.base import PerExpertBackend
from cpu_kernels.format.pack import unpack_expert
from cpu_kernels.format.reference import reference_ffn
from cpu_kernels.format.spec import ExpertSpec
from cpu_kernels.host.threads import Pool, resolve_threads, torch_threads


class TorchBackend(PerExpertBackend):
    """Float32 matrix products on weights that are unpacked for the call.

    Threads share the experts, and each product runs on one of them: MKL sums some shapes (5 rows, for one) in another
    order on two threads, and bits must not depend on how many threads the lane that runs an expert has.
    """

    name = "torch"

    def __init__(self, threads: int | None = None) -> None:
        self.n_threads = resolve_threads(threads)

    def ffn(self, spec: ExpertSpec, record: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, H] -> float32 [M, H]."""
        return reference_ffn(spec, unpack_expert(spec, record), x)

    def run_each(self, run_one: Callable[[int, int], None], addresses: list[int], positions: list[int]) -> None:
        """Experts side by side, each on one thread. Whatever is raised, none of them runs on afterwards."""

        def run_serially(address: int, position: int) -> None:
            with torch_threads(1):
                run_one(address, position)

        pairs = list(zip(addresses, positions, strict=True))
        if self.n_threads == 1 or len(pairs) < 2:
            for pair in pairs:
                run_serially(*pair)
            return
        jobs = [self._pool.submit(run_serially, *pair) for pair in pairs]
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
            wait(jobs)

    @cached_property
    def _pool(self) -> Pool:
        return Pool(self.n_threads, "hybrimoe-torch")
