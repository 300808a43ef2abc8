"""Experts that do not fit host memory: the same bits at every budget, clear errors, the hot set at the next start."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, PreTrainedModel

from hybrimoe.bench.model.sources import NoTokenizer
from hybrimoe.checkpoint import load
from hybrimoe.cli.shared.deployment import deploy_config
from hybrimoe.errors import BudgetError, CheckpointError, ModelError
from hybrimoe.generation import PrefixCache, SamplingOptions, TextGenerator
from hybrimoe.generation.kv_memory import MOST_TOKENS
from hybrimoe.machine.memory import available_bytes, total_bytes
from hybrimoe.runtime.tier import reader as reader_module
from hybrimoe.runtime.tier.cache import HostCache
from hybrimoe.runtime.tier.reader import BLOCK_BYTES
from hybrimoe.runtime.tier.store import TieredStore
from hybrimoe.runtime.tier.usage import UsageWarning
from scheduler.graph import TaskGraph

from .conftest import SMALL
from .models import OPTIONS, files_of

N_LAYERS, N_EXPERTS = 4, 8
AS_TRANSFORMERS = {"step": "transformers"}
"""All but the experts by transformers: a compiled step computes routers in another order."""


@pytest.fixture
def directory(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """A Mixtral with 32 experts."""
    config = MixtralConfig(**SMALL | {"num_hidden_layers": N_LAYERS, "num_local_experts": N_EXPERTS})
    make_model(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tiered(directory: Path) -> Iterator[Callable[..., PreTrainedModel]]:
    """Loads the model with so many experts in host memory, and closes it."""
    models = []

    def open_with(host: Any, **options: Any) -> PreTrainedModel:
        memory = {"memory": {"disk": "auto", "host": host}}
        models.append(load(directory, **OPTIONS | memory | AS_TRANSFORMERS | options))
        return models[-1]

    yield open_with
    for model in models:
        model.hybrimoe.session.close()


def cache_of(model: PreTrainedModel) -> HostCache:
    store = model.hybrimoe.session.store
    assert isinstance(store, TieredStore)
    return store.cache


def answers(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a prompt and of 6 decode steps behind it, of two sequences."""
    found = []
    with torch.inference_mode():
        for start in (1, 7):
            ids = (torch.arange(9)[None] * start + start) % 60
            output = model(ids, use_cache=True)
            found.append(output.logits[0, -1])
            for _ in range(6):
                ids = output.logits[:, -1:].argmax(-1)
                output = model(ids, past_key_values=output.past_key_values, use_cache=True)
                found.append(output.logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("accelerator", "policy", "in_memory"),
    [("none", "ours", 8), ("none", "ours", 16), ("none", "ours", 24), ("emulated", "ours", 8),
     ("emulated", "ours", 24), ("emulated", "on_demand/none/lru", 16)],
)  # fmt: skip
def test_every_budget_gives_the_same_bits(
    directory: Path, tiered: Callable[..., PreTrainedModel], accelerator: str, policy: str, in_memory: int
) -> None:
    options = {"accelerator": accelerator, "gpu_expert_slots": 6, "policy": policy}
    expected = answers(load(directory, **OPTIONS | options | AS_TRANSFORMERS))
    model = tiered(in_memory, **options)
    assert torch.equal(answers(model), expected)
    stats = model.hybrimoe.session.stats()
    assert stats.tier is not None
    assert (stats.tier.n_slots, stats.tier.n_records) == (in_memory, N_LAYERS * N_EXPERTS)
    assert 0 < stats.tier.held <= in_memory
    total = stats.total
    assert min(total.disk_reads, total.disk_bytes, total.disk_us) > 0
    assert stats.as_dict()["tier"]["slot_bytes"] == cache_of(model).slots.slot_bytes
    assert f"{in_memory} of 32 experts fit host memory" in "".join(model.hybrimoe.explain().remarks)


def test_the_rest_of_a_step_is_compiled(directory: Path, tiered: Callable[..., PreTrainedModel]) -> None:
    model = tiered(12, step="auto")
    ways = model.hybrimoe.explain().ways
    assert all("compiled" in way and "read from disk" in way for way in ways.values()), ways
    expected = answers(load(directory, **OPTIONS | AS_TRANSFORMERS))
    assert torch.nn.functional.cosine_similarity(answers(model), expected).min() > 0.9999
    assert model.hybrimoe.step.n_steps >= 12


def test_reads_stand_in_the_timeline(tiered: Callable[..., PreTrainedModel]) -> None:
    model = tiered(8)
    session = model.hybrimoe.session
    session.record_timeline(True)
    answers(model)
    reads = [record for record in session.timeline if record.lane == "disk"]
    assert len(reads) >= session.stats().total.disk_reads > 0
    assert all(read.end_us > read.start_us and read.bytes > 0 and read.step >= 0 for read in reads[8:])


@pytest.mark.parametrize("policy", ["ours", "on_demand/none/lru"])
def test_an_accelerators_plans_know_what_is_read(tiered: Callable[..., PreTrainedModel], policy: str) -> None:
    """What ran is a linear extension of the plans' graph, with the reads that CPU and transfers have waited for."""
    model = tiered(12, accelerator="emulated", gpu_expert_slots=6, policy=policy)
    session = model.hybrimoe.session
    resident = session.slot_contents()
    session.record_timeline(True)
    answers(model)
    records, plans, planner = session.timeline, session.plans, session.planner
    assert sum(len(item.plan.reads) for item in plans) > 0
    graph = TaskGraph.from_plans(plans, planner.costs, session.layer_specs()[0].spec.record_bytes)
    graph.validate(6, resident)
    graph.check_execution([record for record in records if record.lane != "disk"], slack_us=100.0)
    kinds = {graph.tasks[node].kind for task in graph.tasks if task.kind == "read" for node in graph.graph[task.id]}
    assert kinds & {"cpu_expert", "transfer"}
    assert planner.cost_models[0].disk_drift != 1.0, "what reads take was not learnt"


def test_where_all_fits_the_file_is_mapped(tiered: Callable[..., PreTrainedModel]) -> None:
    for host in ("1GiB", "auto"):
        assert not isinstance(tiered(host).hybrimoe.session.store, TieredStore)


@pytest.mark.parametrize("host", [0, 7, "1KiB"])
def test_too_small_a_budget_is_refused_with_the_smallest_that_works(
    directory: Path, tiered: Callable[..., PreTrainedModel], host: Any
) -> None:
    with pytest.raises(BudgetError, match=r"at least 8 must be in memory at once: give (\d+)B") as refused:
        tiered(host)
    assert files_of("experts", directory) == [], "it was refused after the experts were packed"
    least = int(str(refused.value).partition("give ")[2].partition("B")[0])
    with pytest.raises(BudgetError):
        tiered(f"{least - 1}B")
    assert cache_of(tiered(f"{least}B")).slots.n_slots == 8


def test_a_lossy_policy_needs_all_experts(tiered: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(BudgetError, match="needs all experts in host memory"):
        tiered(8, lossy="skip")


def test_a_file_that_is_cut_ends_the_call_and_no_other(directory: Path, tiered: Callable[..., PreTrainedModel]) -> None:
    model = tiered(8)
    expected = answers(model)
    (path,) = files_of("experts", directory)
    whole, known = path.read_bytes(), path.stat()
    os.truncate(path, known.st_size // 4)
    with pytest.raises(CheckpointError, match=rf"{path.name} was cut short .*model\.layers\.\d.*expert \d"):
        answers(model)
    with path.open("r+b") as file:
        file.write(whole)
    with pytest.raises(CheckpointError, match="was written to while it was in use"):
        answers(model)
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert torch.equal(answers(model), expected)
    assert model.hybrimoe.session.stats().tier.failed > 0


def test_a_disk_that_returns_errors_ends_the_call_and_no_other(
    tmp_path: Path, tiered: Callable[..., PreTrainedModel]
) -> None:
    model = tiered(8)
    expected, reader = answers(model), cache_of(model).reader
    good = os.dup(reader._descriptor)
    broken = os.open(tmp_path / "not readable", os.O_WRONLY | os.O_CREAT)
    try:
        os.dup2(broken, reader._descriptor)  # what the system then says of a read is an error
        with pytest.raises(CheckpointError, match=r"expert \d.*cannot be read: Bad file descriptor.*hybrimoe verify"):
            answers(model)
        os.dup2(good, reader._descriptor)
        assert torch.equal(answers(model), expected)
    finally:
        os.close(good)
        os.close(broken)


def test_reads_that_come_in_pieces_are_whole(
    tiered: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pieces = tiered(8), []
    expected, whole = answers(model), reader_module._read_at

    def short(descriptor: int, into: memoryview, offset_bytes: int) -> int:
        pieces.append(min(BLOCK_BYTES + 100, whole(descriptor, into[: 2 * BLOCK_BYTES], offset_bytes)))
        return pieces[-1]

    monkeypatch.setattr(reader_module, "_read_at", short)
    assert torch.equal(answers(model), expected)
    assert len(pieces) > 2 * N_LAYERS * N_EXPERTS


@pytest.mark.parametrize("phase", ["prompt", "reply"])
def test_a_reply_that_a_disk_ends_says_so_and_the_next_one_is_right(
    tiered: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    generator = TextGenerator(tiered(8), NoTokenizer())
    model = generator.model

    def reply(cache: PrefixCache) -> list[int]:
        found = generator.reply(range(1, 10), SamplingOptions(temperature=0.0, max_new_tokens=8), cache=cache)
        "".join(found)
        return list(found.token_ids)

    expected, kept = reply(PrefixCache(model)), PrefixCache(model)
    good, left = reader_module._read_at, [0 if phase == "prompt" else 40]

    def fails(descriptor: int, into: memoryview, offset_bytes: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        return good(descriptor, into, offset_bytes)

    monkeypatch.setattr(reader_module, "_read_at", fails)
    with pytest.raises(CheckpointError, match=r"expert \d.*cannot be read: Input/output error; check the disk"):
        list(map(reply, [kept] * 20))  # what is in memory needs no disk
    monkeypatch.setattr(reader_module, "_read_at", good)
    assert reply(kept) == expected
    assert reply(PrefixCache(model)) == expected


def test_a_file_that_is_deleted_is_read_on(directory: Path, tiered: Callable[..., PreTrainedModel]) -> None:
    model = tiered(8)
    expected = answers(model)
    files_of("experts", directory)[0].unlink()
    assert torch.equal(answers(model), expected)


def test_what_was_used_is_there_at_the_next_start(directory: Path, tiered: Callable[..., PreTrainedModel]) -> None:
    first = tiered(12)
    expected, uses = answers(first), cache_of(first).uses.copy()
    first.hybrimoe.session.close()
    (kept,) = directory.rglob("*.usage.json")
    second = tiered(12)
    hottest = np.argsort(-uses.reshape(-1), kind="stable")[:12]
    cache = cache_of(second)
    while cache.state().held < 12:
        cache.reader.wait()
        cache.take_ended()
    addresses = np.concatenate(cache.addresses)
    assert np.count_nonzero(addresses[hottest]) >= 11, "one slot is the start's own"
    assert torch.equal(answers(second), expected)
    second.hybrimoe.session.close()

    (path,) = files_of("experts", directory)
    os.utime(path, ns=(1, 1))  # another file now, as far as anybody can tell
    assert tiered(12).hybrimoe.session.store.earlier_uses is None
    kept.write_text("{")
    assert tiered(12).hybrimoe.session.store.earlier_uses is None


def test_usage_that_cannot_be_kept_is_a_warning(directory: Path, tiered: Callable[..., PreTrainedModel]) -> None:
    model = tiered(8)
    answers(model)
    (path,) = files_of("experts", directory)
    for folder in model.hybrimoe.session.store._usage._paths:
        folder.mkdir(parents=True)  # a folder stands where the file would be
    with pytest.warns(UsageWarning, match=f"could not be kept for the next start.*{path.parent}"):
        model.hybrimoe.session.close()


def test_the_budget_changes_while_the_model_runs(directory: Path, tiered: Callable[..., PreTrainedModel]) -> None:
    expected = answers(load(directory, **OPTIONS | AS_TRANSFORMERS))
    session = (model := tiered(16)).hybrimoe.session
    slot_bytes = cache_of(model).slots.slot_bytes
    for budget, fitting in ((8, 8), (0.75, 24), (f"{10 * slot_bytes}B", 10), ("1GiB", 32)):
        assert session.resize_host(budget) == fitting == session.stats().tier.n_slots
        assert torch.equal(answers(model), expected)
    for wrong in (7, "1KiB", 33):
        with pytest.raises(BudgetError):
            session.resize_host(wrong)
    assert session.stats().tier.n_slots == 32
    with pytest.raises(ModelError, match="--host-memory"):
        load(directory, **OPTIONS | AS_TRANSFORMERS).hybrimoe.session.resize_host(8)


def test_a_control_groups_limit_holds_for_experts(
    tiered: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot_bytes = cache_of(tiered(8)).slots.slot_bytes
    group = tmp_path / "cgroup" / "service"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/service\n")
    limit = 40 * slot_bytes
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{limit // 2}\n")
    for asks in (available_bytes, total_bytes):
        monkeypatch.setattr(asks, "__defaults__", (tmp_path / "cgroup", tmp_path / "own"))
    auto, share = tiered("auto").hybrimoe.session, tiered(0.5).hybrimoe.session
    assert auto.stats().tier.n_slots == 15, "three quarters of the 20 that the group has left"
    assert share.stats().tier.n_slots == 20, "half of what the group may have at all"
    (group / "memory.current").write_text(f"{limit}\n")
    with pytest.raises(BudgetError, match=r"32 experts need .* more host memory, .* are available"):
        share.resize_host(32)


def test_the_command_line_sets_the_budget(directory: Path) -> None:
    memory = deploy_config(None, model=str(directory), host_memory="8GiB", slots="6").memory
    assert (str(memory.host), str(memory.disk), str(memory.gpu_experts)) == ("8GiB", "auto", "6")


def test_a_model_that_nobody_closes_leaves_no_threads(directory: Path) -> None:
    model = load(directory, **OPTIONS | AS_TRANSFORMERS | {"memory": {"disk": "auto", "host": 8}})
    answers(model)
    reader = cache_of(model).reader
    assert reader._threads
    del model
    gc.collect()
    assert not reader._threads


def test_experts_can_be_had_back(directory: Path, tiered: Callable[..., PreTrainedModel]) -> None:
    session = tiered(8).hybrimoe.session
    other = load(directory, **OPTIONS).hybrimoe.session
    for expert in (0, 5):
        assert torch.equal(session.read_expert(3, expert).up, other.read_expert(3, expert).up)


def test_a_long_prompt_reads_each_expert_once(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes through in one part where memory has room for it, else in parts that pass the layers together."""
    config = MixtralConfig(**SMALL | {"num_hidden_layers": N_LAYERS, "num_local_experts": N_EXPERTS})
    config.max_position_embeddings = 2 * MOST_TOKENS
    make_model(config).save_pretrained(tmp_path / "model")
    host = {"memory": {"disk": "auto", "host": N_LAYERS * N_EXPERTS // 4}}
    model = load(tmp_path / "model", **OPTIONS | host)
    session, cache = model.hybrimoe.session, PrefixCache(model)
    ids = [3 + 7 * n % 50 for n in range(MOST_TOKENS + 300)]
    reads = {}
    try:
        for name, size in (("whole", None), ("together", MOST_TOKENS), ("each alone", MOST_TOKENS)):
            if name == "each alone":
                monkeypatch.setattr("hybrimoe.generation.runner.group_of", lambda *_: 0)
            generator = TextGenerator(model, NoTokenizer(), prefill_chunk_tokens=size)
            cache.clear()
            session.reset_stats()
            list(generator.reply(ids, SamplingOptions(max_new_tokens=1), cache=cache))
            total = session.stats().total
            reads[name] = total.disk_reads + total.disk_ahead
        assert max(reads["whole"], reads["together"]) <= N_LAYERS * N_EXPERTS < reads["each alone"]
        remarks = " ".join(model.hybrimoe.explain().remarks)
        assert "prompts go through in parts of up to" in remarks
    finally:
        session.close()
