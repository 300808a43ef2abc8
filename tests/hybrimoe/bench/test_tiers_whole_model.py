"""Whole models under a memory limit of the system: the group, the routing that is played, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrimoe.bench.model.sources import RandomSource
from hybrimoe.bench.tiers import contender, whole_model
from hybrimoe.bench.tiers.layers import Request
from hybrimoe.bench.tiers.memory_group import V1, V2, MemoryGroup, memory_group
from hybrimoe.cli.app import app
from hybrimoe.demo import demo_model_path
from hybrimoe.errors import BudgetError, ModelError

SMALLER = {
    "hidden_size": 256, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
REQUEST = Request("olmoe-1b-7b", 2, "int4", 0.25, 12, 4, 1, None, Path())


def _hierarchy(root: Path, version: int) -> Path:
    """A folder that looks like the system's, with the group of a process in it."""
    top = root / "memory" if version == 1 else root
    (top / "mine").mkdir(parents=True)
    for folder in (top, top / "mine"):
        (folder / "cgroup.procs").write_text("")
    (root / "membership").write_text("4:memory:/mine\n3:cpu:/\n" if version == 1 else "0::/mine\n")
    return top


@pytest.mark.parametrize(("version", "names"), [(1, V1), (2, V2)])
def test_group_is_made_beneath_our_own(tmp_path: Path, version: int, names: Any, monkeypatch: Any) -> None:
    top = _hierarchy(tmp_path, version)
    monkeypatch.setattr("os.getpid", lambda: 4711)
    with memory_group(1 << 20, root=tmp_path, membership=tmp_path / "membership") as group:
        assert (group.folder.parent, group.names) == (top / "mine", names)
        assert (group.folder / names.limit).read_text() == str(1 << 20)
        group.join()
        assert (group.folder / "cgroup.procs").read_text() == "4711"
        assert group.peak_bytes() is None
        (group.folder / names.peak).write_text("12345\n")
        assert group.peak_bytes() == 12345


def test_group_that_cannot_be_made_says_who_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    _hierarchy(tmp_path, 2)
    monkeypatch.setattr(Path, "mkdir", refused)
    with (
        pytest.raises(BudgetError, match=r"mine: Permission denied.*run it as root"),
        memory_group(1, root=tmp_path, membership=tmp_path / "membership"),
    ):
        pass
    with pytest.raises(BudgetError, match="has none for memory"), memory_group(1, root=tmp_path / "not there"):
        pass


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Request:
    """OLMoE's routing in a model of small matrices; llama.cpp takes no part, and processes are calls."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(whole_model, "RandomSource", partial(_source))
    monkeypatch.setattr(whole_model, "contenders", lambda: list(whole_model.OURS))
    monkeypatch.setattr(whole_model, "memory_group", _no_group)
    monkeypatch.setattr(whole_model, "in_group", lambda job, limit: contender.measured(job) | {"peak_bytes": limit})
    return dataclasses.replace(REQUEST, folder=tmp_path / "disk")


def _source(shape: str, layers: int | None, n_tokens: int = 0, replaced: Any = None) -> RandomSource:
    return RandomSource(shape, layers, n_tokens, replaced=SMALLER | (replaced or {}))


@contextmanager
def _no_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    yield MemoryGroup(Path(), V2)


def test_contenders_compute_the_same_along_the_given_routing(small: Request) -> None:
    found = whole_model.measure(small, [0.25, 0.5], 64 << 20)  # raises where bits or routing differ
    assert [result["n_slots"] for result in found] == [32, 64]
    for result in found:
        assert [row["name"] for row in result["contenders"]] == ["ours", "mmap", "static"]
        assert result["limit_bytes"] > result["n_slots"] * result["record_bytes"] + (64 << 20)
        assert result["left_out"] == ["llama.cpp"]
        reads = {row["name"]: row["counters"]["prefill"]["disk_reads"] for row in result["contenders"]}
        assert reads["mmap"] == 0
        assert min(reads["ours"], reads["static"]) > 0
    json.dumps(found)
    assert list(small.folder.iterdir()) == []


def test_wrong_results_are_refused(small: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = contender.measured

    def wrong(job: Any, limit: int) -> dict[str, Any]:
        found = computed(job) | {"peak_bytes": None}
        return found if job.name != "static" else found | {"logits": found["logits"] + 1e-3}

    monkeypatch.setattr(whole_model, "in_group", wrong)
    with pytest.raises(ModelError, match="computes something else than ours"):
        whole_model.measure(small, [0.5], 1)
    logits = np.ones(4, np.float32)
    ours = {"logits": logits, "uses": np.ones((1, 4))}
    whole_model.check_agreement({"ours": ours, "llama.cpp": {"logits": logits * 1.01}}, np.ones((1, 4)))
    with pytest.raises(ModelError, match="other experts than it was made for"):
        whole_model.check_agreement({"ours": ours}, np.zeros((1, 4)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--system-limit", "--dtype", "int8"], "int4 experts"), (["--allowance", "1GiB"], "goes with --system-limit"),
        (["--system-limit", "--allowance", "0.5"], "a size like 96MiB"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        app(["bench", "tiers", *options])
    assert left.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_process_that_needs_more_than_the_limit_is_told_of() -> None:
    try:
        with memory_group(1 << 20):
            pass
    except BudgetError:
        pytest.skip("no memory cgroup here")
    job = contender.Job("mmap", demo_model_path(), 8, np.zeros((1, 1)), 1, 1, 1)
    with pytest.raises(BudgetError, match=r"mmap (was ended by the system|does not fit).*--allowance"):
        whole_model.in_group(job, 1 << 20)
