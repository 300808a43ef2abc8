"""What a device holds beside what was planned for it, on fake cards that count every byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import hybrimoe
from cpu_kernels import ExpertSpec
from hybrimoe.checkpoint.meta import model_shape
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.machine.profiles import open_hardware
from hybrimoe.runtime.startup.budget import DEVICE_RESERVE_BYTES, unpack_bytes
from hybrimoe.tracing.study.planning import fit
from tests.fake_device import DEVICE_TYPE, fake_cards
from tests.hybrimoe.generation.test_on_cards import PROMPT, save_model

CARD = f"{DEVICE_TYPE}:0"


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
        assert planned.total == planned.dense + planned.slots + planned.kv + planned.unpack + planned.reserve
        held = cards.used_bytes()
        assert planned.dense + planned.slots <= held <= planned.dense + planned.slots + planned.reserve // 1000
        for text in (PROMPT, PROMPT[:20]):
            reply = TextGenerator(model, byte_tokenizer).reply(text, SamplingOptions(max_new_tokens=8, temperature=0.0))
            assert len(list(reply)) > 0
        assert cards.peak_bytes() <= planned.total
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
    assert (planned.kv, planned.unpack, planned.reserve) == (found.kv_bytes, found.unpack_bytes, found.reserve_bytes)
    assert planned.dense == pytest.approx(found.dense_bytes, rel=0.02), "a plan leaves rotary frequencies out"
    promised = found.device_experts * found.expert_bytes
    assert abs(planned.slots - promised) <= slot_bytes, "records of so small experts are padded"
    assert planned.total <= beside < planned.total + slot_bytes
