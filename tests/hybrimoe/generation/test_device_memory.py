"""What a device holds beside what was planned for it, on fake cards that count every byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import hybrimoe
from cpu_kernels import ExpertSpec
from hybrimoe.checkpoint.meta import model_shape
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.machine.profiles import open_hardware
from hybrimoe.runtime.startup.budget import DEVICE_RESERVE_BYTES, unpack_bytes
from hybrimoe.step.captured import LEAST_ROOM
from hybrimoe.tracing.study.planning import fit
from tests.fake_device import DEVICE_TYPE, fake_cards
from tests.fake_device.graphs import CardGraphs
from tests.hybrimoe.generation.test_on_cards import PROMPT, save_model

CARD = f"{DEVICE_TYPE}:0"
WORKSPACE_BYTES = 8_519_680


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Callable[[Path], Path]) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path / "cache")))


@pytest.mark.parametrize("slots", [8, 1.0])
@pytest.mark.parametrize("step", ["auto", "transformers"])
def test_weights_and_slots_are_what_a_card_holds_and_a_reply_stays_within_the_plan(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, slots: int | float, step: str
) -> None:
    with fake_cards(1) as cards:
        model = hybrimoe.load(
            save_model(tmp_path / "model", "float32"), accelerator=CARD, gpu_expert_slots=slots, step=step,
            expert_dtype="float32", backend="torch", progress=False,
        )  # fmt: skip
        session = model.hybrimoe.session
        (planned,) = session.planned_memory()
        slots_bytes = sum(device.n_slots * device.slot_bytes for device in session.accelerators)
        assert planned.slots == slots_bytes
        parts = planned.dense, planned.slots, planned.kv, planned.unpack, planned.workspaces, planned.graphs
        assert planned.total == sum(parts) + planned.reserve
        assert (planned.staging, session.accelerators[0].staging_bytes) == (0, 0), (
            "the card reads host memory by itself"
        )
        held = cards.used_bytes()
        assert planned.dense + planned.slots <= held <= planned.dense + planned.slots + planned.reserve // 1000
        for text in (PROMPT, PROMPT[:20]):
            reply = TextGenerator(model, byte_tokenizer).reply(text, SamplingOptions(max_new_tokens=8, temperature=0.0))
            assert len(list(reply)) > 0
        assert cards.peak_bytes() <= planned.total
        session.close()


@pytest.mark.parametrize("slots", [8, 1.0])
def test_workspaces_and_recorded_steps_are_parts_of_the_plan(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, slots: int | float
) -> None:
    """A card takes a workspace on each stream that multiplies, as torch's allocator does, and memory for graphs."""
    monkeypatch.setattr("hybrimoe.runtime.startup.budget.records_graphs", lambda device: True)
    with fake_cards(1, workspace_bytes=WORKSPACE_BYTES) as cards:
        monkeypatch.setattr("hybrimoe.step.build.graphs_of", lambda device: CardGraphs(cards))
        model = hybrimoe.load(
            save_model(tmp_path / "model", "float32"), accelerator=CARD, gpu_expert_slots=slots,
            expert_dtype="float32", backend="torch", progress=False,
        )  # fmt: skip
        (planned,) = model.hybrimoe.session.planned_memory()
        assert planned.workspaces == 2 * WORKSPACE_BYTES
        assert planned.workspaces + planned.graphs + planned.reserve == DEVICE_RESERVE_BYTES
        reply = TextGenerator(model, byte_tokenizer).reply(
            PROMPT, SamplingOptions(max_new_tokens=8, temperature=0.0)
        )  # fmt: skip
        assert len(list(reply)) > 0
        step = model.hybrimoe.step
        assert step.captures > 1, "of the comparison, and of the reply"
        assert 0 < step.graph_bytes <= planned.graphs
        held = planned.dense + planned.slots + planned.workspaces + step.graph_bytes
        token_bytes = 2 * 4 * 32 * 4  # keys and values of 4 layers with one head each
        assert held <= cards.used_bytes() <= held + LEAST_ROOM * token_bytes, "the rest is the reply's cache"
        told = model.hybrimoe.explain().memory
        assert told["fake card (privateuseone:0)"] == asdict(planned)
        assert told["host"]["experts"] == model.hybrimoe.stats().store_bytes
        model.hybrimoe.session.close()


def test_buffers_for_records_that_cannot_be_locked_are_told(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save_model(tmp_path / "model", "float32")
    with fake_cards(1, refuses_locking=True):
        with pytest.warns(RuntimeWarning, match="could not be page-locked"):
            model = hybrimoe.load(
                folder, accelerator=CARD, gpu_expert_slots=8, step="transformers", expert_dtype="float32",
                backend="torch", progress=False,
            )  # fmt: skip
        session = model.hybrimoe.session
        options = SamplingOptions(max_new_tokens=2, temperature=0.0)
        assert len(list(TextGenerator(model, byte_tokenizer).reply(PROMPT, options))) > 0
        (planned,) = session.planned_memory()
        assert planned.staging == session.accelerators[0].staging_bytes > 0
        session.close()


def test_auto_slots_fill_what_the_plan_leaves(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "float32")
    with fake_cards(1, card_bytes=600 << 20) as cards:
        model = hybrimoe.load(
            folder, accelerator=CARD, expert_dtype="float32", backend="torch", progress=False, memory={"kv": "80MiB"}
        )
        (planned,) = model.hybrimoe.session.planned_memory()
        assert planned.total <= cards.card_bytes
        assert planned.kv == 80 << 20
        model.hybrimoe.session.close()


def test_a_plan_promises_the_slots_that_a_session_then_has(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "bfloat16")
    shape = model_shape(str(folder))
    spec = ExpertSpec(shape.hidden, shape.inter, "bfloat16")
    beside = DEVICE_RESERVE_BYTES + unpack_bytes(spec) + 420_000  # dense weights, keys and values, 15 experts
    found = fit(
        shape, open_hardware("laptop"), context=None, expert_dtype="bfloat16", dense_dtype="bfloat16",
        device_bytes=beside, host_bytes=8 << 30,
    )  # fmt: skip
    with fake_cards(1, card_bytes=beside):
        model = hybrimoe.load(folder, accelerator=CARD, expert_dtype="bfloat16", backend="torch", progress=False)
        session = model.hybrimoe.session
        (planned,), slot_bytes = session.planned_memory(), session.accelerators[0].slot_bytes
        model.hybrimoe.session.close()
    assert 0 < found.device_experts < found.n_experts
    assert (planned.kv, planned.unpack) == (found.kv_bytes, found.unpack_bytes)
    assert planned.workspaces + planned.graphs + planned.reserve == found.kept_free_bytes - found.unpack_bytes
    assert planned.dense == pytest.approx(found.dense_bytes, rel=0.02), "a plan leaves rotary frequencies out"
    promised = found.device_experts * found.expert_bytes
    assert abs(planned.slots - promised) <= slot_bytes, "records of so small experts are padded"
    assert planned.total <= beside < planned.total + slot_bytes
