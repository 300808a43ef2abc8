"""`backend: auto` after a calibration."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import cpu_kernels as ck
from cpu_kernels.backends import choice
from cpu_kernels.backends.choice import BackendChoice, measured_choice, write_choice
from cpu_kernels.jit import cache_dir


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(cache_dir.ENV_CACHE, str(tmp_path))
    cache_dir.kernel_cache_dir.cache_clear()
    measured_choice.cache_clear()
    yield
    cache_dir.kernel_cache_dir.cache_clear()
    measured_choice.cache_clear()


def test_numba_before_any_measurement() -> None:
    assert measured_choice().backend == "numba"
    assert ck.get_backend("auto").name == "numba"


def test_the_fastest_that_ran_every_dtype() -> None:
    times = {"int4": {"numba": 5.0, "torch": 1.0}, "int8": {"numba": 1.0, "torch": 2.0, "onnx": 0.1}}
    made = BackendChoice.from_times(times)
    assert made.backend == "torch"
    write_choice(made)
    assert measured_choice() == made
    assert ck.get_backend("auto").name == "torch"


def test_a_choice_of_other_versions_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    write_choice(BackendChoice.from_times({"int4": {"torch": 1.0}}))
    monkeypatch.setattr(choice, "_version", lambda name: "0.0")
    measured_choice.cache_clear()
    assert measured_choice().backend == "numba"


def test_a_damaged_file_does_not_count() -> None:
    path = choice.choice_path()
    assert path is not None
    path.write_text("{", encoding="utf-8")
    measured_choice.cache_clear()
    assert measured_choice() == BackendChoice()
