"""Rows of a sweep in several processes of this machine (joblib), or on a Ray cluster."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil

from hybrimoe.errors import HybriMoEError, MissingExtraError

Item = TypeVar("Item")
Answer = TypeVar("Answer")
PACKAGES = ("hybrimoe", "scheduler", "yaml_rules", "cpu_kernels", "gpu_kernels")
NOT_SHIPPED = ("*.safetensors", "__pycache__")
"""Files of the packages that no row reads: the demo model's weights, compiled code. In .gitignore's syntax."""
RETRIES = 3
"""Times that a row is computed again whose worker was lost."""


class ClusterError(HybriMoEError):
    """There is no Ray cluster, or none that can be reached."""


def in_processes(run: Callable[[Item], Answer], items: Sequence[Item], jobs: int) -> Iterator[tuple[int, Answer]]:
    """(index, answer) of every item as it is done, by ``jobs`` processes (-1: one a core).

    The processes end with this one, even where it is killed. Raises MissingExtraError without joblib.
    """
    try:
        import joblib
    except ImportError as error:
        raise MissingExtraError("bench", "joblib runs the sweep in several processes") from error
    tasks = (joblib.delayed(_run_beside)(run, index, item) for index, item in enumerate(items))
    yield from joblib.Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered")(tasks)


def _run_beside(run: Callable[[Item], Answer], index: int, item: Item) -> tuple[int, Answer]:
    _end_with_parent()
    return index, run(item)


@cache
def _end_with_parent() -> None:
    """From now on this process ends when the one that started it does."""
    threading.Thread(target=_wait_for_end, args=(psutil.Process(os.getppid()),), daemon=True).start()


def _wait_for_end(parent: psutil.Process) -> None:
    parent.wait()
    os._exit(1)


def on_cluster(
    run: Callable[[Item, Mapping[str, str]], Answer], items: Sequence[Item], files: Sequence[Sequence[Path]]
) -> Iterator[tuple[int, Answer]]:
    """(index, answer) of every item as it is done, by the Ray cluster of RAY_ADDRESS, or the one that runs here.

    ``files`` of each item are shipped, once each, and ``run`` is told where each lies on the worker. The source of this
    package is shipped as well. A worker that is lost costs the rows that it was computing: they are computed again.
    Raises MissingExtraError without ray, ClusterError where no cluster answers.
    """
    ray = _connect()
    try:
        contents = {path: path.read_bytes() for paths in files for path in paths}
        shipped = {path: ray.put((path.name, data)) for path, data in contents.items()}
        task = ray.remote(max_retries=RETRIES, num_cpus=1)(_run_shipped)
        pending = {
            task.remote(run, item, [str(path) for path in paths], *[shipped[path] for path in paths]): index
            for index, (item, paths) in enumerate(zip(items, files, strict=True))
        }
        while pending:
            for done in ray.wait(list(pending), num_returns=1)[0]:
                yield pending.pop(done), ray.get(done)
    finally:
        ray.shutdown()


def _connect() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("cluster", "--cluster needs ray") from error
    root = Path(__file__).parents[3]
    environment = {"py_modules": [str(root / package) for package in PACKAGES], "excludes": list(NOT_SHIPPED)}
    try:
        ray.init(address="auto", runtime_env=environment, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        named = os.environ.get("RAY_ADDRESS", "this machine (RAY_ADDRESS names another one)")
        raise ClusterError(
            f"no Ray cluster answers at {named}: {error}. Start one with `ray start --head`, or leave --cluster out"
        ) from error
    return ray


def _run_shipped(
    run: Callable[[Item, Mapping[str, str]], Answer], item: Item, names: Sequence[str], *files: tuple[str, bytes]
) -> Answer:
    return run(item, {name: _unpack(*file) for name, file in zip(names, files, strict=True)})


def _unpack(name: str, data: bytes) -> str:
    """The path of a shipped file on this worker, in a folder named by its contents."""
    folder = Path(tempfile.gettempdir()) / f"hybrimoe-{hashlib.sha256(data).hexdigest()[:24]}"
    path = folder / name
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        partial = folder / f"{os.getpid()}.partial"
        partial.write_bytes(data)
        partial.replace(path)
    return str(path)
