"""`memory.host_copy: drop`: same results with less host memory, what reads copies back, and what is refused."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels import relative_error
from cpu_kernels.host.mapped import MappedFile
from gpu_kernels import EmulatedAccelerator, LaneError, LostError
from gpu_kernels.streams import HostEvent
from hybrimoe.checkpoint.pack.experts import MappedStore
from hybrimoe.config.deploy import load_config
from hybrimoe.errors import CheckpointError, ConfigError, ModelError
from hybrimoe.runtime.host_copy import never_moves
from hybrimoe.runtime.store import give_pages_back, host_bytes
from scheduler.lossy import resolve_lossy
from tests.fake_device import DEVICE_TYPE, fake_cards

from .conftest import Rig, routing

MakeRig = Callable[..., Rig]
CARD = f"{DEVICE_TYPE}:0"
N_SLOTS = 9


@pytest.fixture
def dropping(make_rig: MakeRig) -> Callable[..., Rig]:
    """Rigs of policy static, whose experts in slots have no host copy."""

    def make(**settings: Any) -> Rig:
        return make_rig(**({"policy": "static", "host_copy": "drop", "gpu_expert_slots": N_SLOTS} | settings))

    return make


def check_right(rig: Rig, seed: int = 0) -> None:
    for n_tokens in (1, 1, 30, 2):
        for layer in range(len(rig.layers)):
            call = routing(n_tokens, 8, 3, seed=seed + 7 * n_tokens + layer)
            assert relative_error(rig.call(layer, *call), rig.expected(layer, *call)) < 1e-5


def test_the_memory_of_experts_in_slots_is_given_back_and_results_are_the_same(
    make_rig: MakeRig, dropping: MakeRig
) -> None:
    rig, keeping = dropping(), make_rig(policy="static", gpu_expert_slots=N_SLOTS)
    for seed in range(6):
        call = routing(1 + seed % 3 * 20, 8, 3, seed)
        assert torch.equal(rig.call(seed % 3, *call), keeping.call(seed % 3, *call))
    stats, kept = rig.session.stats(), keeping.session.stats()
    size = rig.session.layer_specs()[0].spec.record_bytes
    assert stats.total.accel_experts == kept.total.accel_experts > 0
    assert N_SLOTS * (size - 2 * 4096) <= stats.dropped_bytes <= N_SLOTS * size
    assert stats.store_bytes + stats.dropped_bytes == kept.store_bytes == 24 * size
    assert (kept.dropped_bytes, stats.as_dict()["dropped_bytes"]) == (0, stats.dropped_bytes)
    in_slots = set(rig.session.slot_contents().values())
    assert len(in_slots) == N_SLOTS
    resident = sum(_resident_bytes(rig, layer, expert) for layer, expert in in_slots)
    assert resident <= N_SLOTS * 2 * 4096, "the pages are still there"


def _resident_bytes(rig: Rig, layer: int, expert: int) -> int:
    """Bytes of a record's pages that are in memory, as the system says."""
    record = rig.session.store._records[layer][expert]
    first = record.ctypes.data // 4096 * 4096
    n_pages = -(-(record.ctypes.data + record.nbytes - first) // 4096)
    there = (ctypes.c_ubyte * n_pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(n_pages * 4096), there) == 0
    return sum(page & 1 for page in there) * 4096


def test_nothing_ever_moves(dropping: MakeRig) -> None:
    rig = dropping()
    before = rig.session.slot_contents()
    for seed in range(20):
        check_right(rig, 100 * seed)
    total = rig.session.stats().total
    assert (total.transfers, total.prefetches, rig.session.slot_contents()) == (0, 0, before)


@pytest.mark.parametrize("slots", [4, 15, 24, 0])
def test_a_resize_reads_them_back_and_drops_again(dropping: MakeRig, slots: int) -> None:
    rig = dropping()
    assert rig.session.resize_slots(slots) == slots
    check_right(rig)
    assert len(rig.session.store.released()) == slots
    rig.session.resize_slots(N_SLOTS)
    check_right(rig, 50)


def test_policies_that_move_are_refused_while_it_runs_and_others_are_taken(dropping: MakeRig) -> None:
    rig = dropping()
    with pytest.raises(ModelError, match=r"'ours' moves experts.*host_copy: drop"):
        rig.session.change_policy("ours")
    check_right(rig)
    rig.session.change_policy("static/none/lru")
    check_right(rig)
    assert len(rig.session.store.released()) == N_SLOTS


def test_weights_are_read_back_from_the_slots(dropping: MakeRig) -> None:
    rig = dropping()
    (layer, expert), *_ = rig.session.store.released()
    with pytest.raises(CheckpointError, match="host copy was given up"):
        rig.session.store.read(layer, expert)
    found = rig.session.read_expert(layer, expert)
    assert torch.equal(found.down, rig.originals[layer].down_proj[expert].detach())
    rig.session.bring_back()
    assert (rig.session.store.released(), rig.session.stats().dropped_bytes) == ([], 0)
    assert torch.equal(rig.session.store.read(layer, expert).down, found.down)
    check_right(rig)


def test_a_call_that_fails_reads_them_back_from_the_slots(dropping: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = dropping()
    with monkeypatch.context() as patch:

        def broken(*_: Any, **__: Any) -> None:
            raise ArithmeticError("bad kernel")

        patch.setattr("cpu_kernels.backends.torch_backend.TorchBackend.run", broken)
        with pytest.raises((LaneError, ArithmeticError), match="bad kernel"):
            rig.call(0, *routing(8, 8, 3, seed=1))
    check_right(rig)
    assert (len(rig.session.store.released()), rig.session.stats().failures) == (N_SLOTS, 1)


def test_a_lost_accelerator_is_an_error_that_says_so(dropping: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = dropping(device_wait_s=0.3)
    gate = threading.Event()
    accelerator = rig.session.accelerators[0]
    assert isinstance(accelerator, EmulatedAccelerator)
    accelerator._compute.submit(lambda event: gate.wait(), HostEvent())
    for _ in range(2):
        with pytest.raises(LostError, match=r"hangs.*no copy of the experts in its slots.*host_copy: drop"):
            rig.call(0, *routing(20, 8, 3, seed=1))
    gate.set()


def test_a_recording_and_replay_run(dropping: MakeRig) -> None:
    rig = dropping()
    rig.session.record_run()
    check_right(rig)
    assert rig.session.recording.tasks


def mapped_bytes(path: Path) -> int:
    """Bytes of a mapped file that this process has in memory."""
    held, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            held += int(line.split()[1]) << 10
    return held


@pytest.mark.filterwarnings("ignore:emulated accelerator hangs:RuntimeWarning")
def test_a_mapped_file_has_the_copies_so_that_nothing_is_read_back(
    make_rig: MakeRig, dropping: MakeRig, tmp_path: Path
) -> None:
    path = tmp_path / "packed"
    path.write_bytes(make_rig().session.store.buffer.tobytes())
    rig = dropping(start=False, device_wait_s=0.3)
    specs = rig.session.layer_specs()
    mapped = MappedFile(path, 0, sum(layer.nbytes for layer in specs))
    store = MappedStore.over(specs, mapped, path)
    assert store.buffer.sum() > 0  # reads every page
    before = mapped_bytes(path)
    rig.session.finalize(store=store)
    dropped = rig.session.stats().dropped_bytes
    assert dropped >= N_SLOTS * (specs[0].spec.record_bytes - 2 * 4096)
    assert mapped_bytes(path) <= before - dropped
    assert store.released() == []
    check_right(rig)
    rig.session.resize_slots(4)
    assert 0 < rig.session.stats().dropped_bytes < dropped
    rig.session.resize_slots(N_SLOTS)
    gate = threading.Event()
    rig.session.accelerators[0]._compute.submit(lambda event: gate.wait(), HostEvent())  # type: ignore[attr-defined]
    check_right(rig, 30)
    assert rig.session.lost is not None
    gate.set()


@pytest.mark.parametrize("locked", [True, False])
def test_on_a_card_the_pages_are_unlocked_first(dropping: MakeRig, locked: bool) -> None:
    with fake_cards(1, refuses_locking=not locked) as cards:
        if not locked:
            with pytest.warns(RuntimeWarning, match="could not be page-locked"):
                rig = dropping(accelerator=CARD)
        else:
            rig = dropping(accelerator=CARD)
        assert len(rig.session.store.released()) == N_SLOTS
        assert rig.session.store.buffer.ctypes.data not in cards.locked
        check_right(rig)
        rig.session.resize_slots(12)
        check_right(rig, 9)
        rig.session.close()


def test_a_prompt_without_memory_on_the_card_still_takes_slots(dropping: MakeRig) -> None:
    with fake_cards(1) as cards:
        rig = dropping(accelerator=CARD)
        free, _ = cards.memory_info()
        taken = torch.empty(free - 20_000, dtype=torch.uint8, device=CARD)
        call = routing(60, 8, 3, seed=1)
        given = [tensor.to(CARD) for tensor in call]
        with pytest.warns(RuntimeWarning, match="out of memory"):
            found = rig.call(0, *given)
        found = found.cpu()
        assert relative_error(found, rig.expected(0, *call)) < 1e-4
        assert len(rig.session.store.released()) == rig.session.n_slots < N_SLOTS
        assert taken.numel() > 0
        rig.session.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "ours"}, r"never move an expert.*not 'ours'.*host_copy: keep.*static"),
        ({"policy": "static/impact/lru"}, "never move an expert"),
        ({"policy": "llama_cpp"}, "never move an expert"),
        ({"accelerator": "none"}, "needs an accelerator.*there is none"),
        ({"lossy": resolve_lossy("skip")}, "scheduler.lossy .* do not go together"),
    ],
)
def test_what_cannot_be_dropped_is_refused(dropping: MakeRig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dropping(**settings)


def test_a_system_that_cannot_take_pages_back_is_told(dropping: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mmap.MADV_DONTNEED")
    with pytest.raises(ConfigError, match="needs a system that"):
        dropping()


def test_only_whole_pages_are_given_back() -> None:
    memory = host_bytes(5 * 4096, pinned=False)
    memory[:] = 7
    assert give_pages_back(memory[100 : 3 * 4096 + 50]) == 2 * 4096
    assert np.flatnonzero(memory == 0).tolist() == list(range(4096, 3 * 4096))
    assert give_pages_back(memory[10:200]) == 0


@pytest.mark.parametrize(
    ("policy", "stays"),
    [("static", True), ("static/none/lru", True), ("ours", False), ("fiddler", False), ("static/impact/lru", False)],
)
def test_which_policies_never_move(policy: str, stays: bool) -> None:
    assert never_moves(policy) is stays


def test_the_deployment_file_has_it(tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text("memory: {host_copy: drop}\n")
    assert load_config(file).memory.host_copy == "drop"
    assert load_config({}, host_copy="drop").memory.host_copy == "drop"
    with pytest.raises(ConfigError, match="host_copy"):
        load_config({"memory": {"host_copy": "never"}})
