"""The `onnx` backend: each expert as an ONNX graph (`onnx_graph`), run by ONNX Runtime's CPU provider.

Memory: a session holds its own copy of the expert, in the form that ONNX Runtime's kernels want, beside the packed
record: about the record's size for int4 and int8, its size for float32, twice its size for bfloat16 (held as float32),
and up to three times that while the session is made. Sessions are kept for up to `CACHE_GIB` (or the environment
variable HYBRIMOE_ONNX_CACHE, in GiB) over the whole process; with more experts than fit, each call makes sessions
anew, which takes longer than running them: choose another backend then.
"""

from __future__ import annotations

import importlib.metadata
from concurrent.futures import Future, wait
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch

from cpu_kernels.backends.base import PerExpertBackend, check_run
from cpu_kernels.backends.onnx_graph import build_model, graph_bytes, unsupported
from cpu_kernels.backends.prepared import PreparedExperts, shared_cache
from cpu_kernels.engine.dispatch import Dispatch
from cpu_kernels.errors import BackendError
from cpu_kernels.format.spec import ExpertSpec
from cpu_kernels.host.threads import Pool, resolve_threads

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ENV_CACHE_GIB = "HYBRIMOE_ONNX_CACHE"
CACHE_GIB = 4.0
LOG_ERRORS = 3  # ONNX Runtime's severity: warnings about the graph are of no use to a user of the backend
PACKAGES = ("onnx", "onnxruntime")


class OnnxBackend(PerExpertBackend):
    """Experts of a call run side by side, one thread each, the ones with most tokens first.

    One thread a session keeps the number of threads at `threads`, where a pool in each of hundreds of sessions would
    not; a single expert is therefore no faster with more threads.
    """

    name = "onnx"

    def __init__(self, threads: int | None = None) -> None:
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            raise BackendError(
                f"backend 'onnx' needs {' and '.join(missing)}, not installed here: pip install 'hybrimoe[onnx]'"
            )
        self.n_threads = resolve_threads(threads)
        self.sessions: PreparedExperts[InferenceSession] = shared_cache(self.name, ENV_CACHE_GIB, CACHE_GIB)

    def supports(self, spec: ExpertSpec) -> str | None:
        """None, or why an expert of `spec` cannot be an ONNX graph."""
        return unsupported(spec)

    def run(
        self,
        spec: ExpertSpec,
        records: np.ndarray,
        positions: np.ndarray,
        dispatch: Dispatch,
        hidden: np.ndarray,
        out_rows: np.ndarray,
    ) -> None:
        """See `CpuBackend.run`."""
        if positions.size < 2 or self.n_threads == 1:
            super().run(spec, records, positions, dispatch, hidden, out_rows)
            return
        check_run(spec, records, positions, dispatch, hidden, out_rows)
        n_rows = np.diff(dispatch.offsets)[positions]
        running: list[Future[None]] = []
        for i in np.argsort(-n_rows, kind="stable").tolist():
            one = slice(i, i + 1)
            running.append(
                _pool(self.n_threads).submit(
                    super().run, spec, records[one], positions[one], dispatch, hidden, out_rows
                )
            )
        wait(running)  # all of them, before an error leaves: they write to out_rows
        for future in running:
            future.result()

    def ffn(self, spec: ExpertSpec, record: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, H] -> float32 [M, H]."""
        session = self.sessions.get(spec, record, lambda: (open_session(spec, record), graph_bytes(spec)))
        (result,) = session.run(["y"], {"x": x.numpy()})
        return torch.from_numpy(result)


@cache
def _pool(n_threads: int) -> Pool:
    """The threads that backends of this size share, over all layers."""
    return Pool(n_threads, "hybrimoe-onnx")


def open_session(spec: ExpertSpec, record: np.ndarray) -> InferenceSession:
    """A session of the expert packed in `record`, computing on the thread that calls it."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = LOG_ERRORS
    options.enable_cpu_mem_arena = False  # an arena for each of many sessions keeps what they all need once
    try:
        return onnxruntime.InferenceSession(
            build_model(spec, record).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NotImplemented,
        state.RuntimeException,
    ) as error:
        version = importlib.metadata.version("onnxruntime")
        raise BackendError(
            f"ONNX Runtime {version} does not take the graph of {spec.dtype} experts "
            f"({spec.hidden} x {spec.inter}): {error}. Use another backend, or a newer onnxruntime"
        ) from error
