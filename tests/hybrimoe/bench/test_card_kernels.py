"""The benchmark of an accelerator's fused kernels, on the fake device: which rows there are and what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from typer.testing import CliRunner

from cpu_kernels import ExpertSpec, unpack_expert
from gpu_kernels import fused_choice
from hybrimoe.bench.gpu_check.findings import Findings
from hybrimoe.bench.gpu_check.sections.kernels import cuts_of_one_token
from hybrimoe.bench.kernels import card
from hybrimoe.bench.kernels.measure import ParityError
from hybrimoe.bench.kernels.setting import Shape
from hybrimoe.cli.app import app
from hybrimoe.errors import HybriMoEError
from tests.fake_device import DEVICE_TYPE, Cards, StreamedKernels, fake_cards

SMALL = Shape("small", 128, 64, 3)
HOST = torch.device("cpu")


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cards]:
    monkeypatch.setattr(card, "POOL_BYTES", 1 << 20)
    monkeypatch.setattr(card, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(card, "REPEATS", 2)
    with fake_cards() as found:
        yield found


def test_every_case_has_a_row_and_rates_fit_the_times(cards: Cards) -> None:
    rows = card.kernel_rates(f"{DEVICE_TYPE}:0", [SMALL], ["int4", "bfloat16"], [1, 4])
    assert [(row.dtype, row.tokens, row.experts) for row in rows] == [
        (dtype, *case) for dtype in ("int4", "bfloat16") for case in ((1, 3), (1, 2), (4, 3))
    ]
    for row in rows:
        record_bytes = ExpertSpec(128, 64, row.dtype).record_bytes
        assert row.gbps == pytest.approx(row.experts * record_bytes / (row.us * 1e3))
        assert row.us > 0
        assert row.read_share > 0


def test_the_command_prints_what_was_measured(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "CARD_SHAPES", (SMALL,))
    words = ["bench", "kernels", "--accelerator", f"{DEVICE_TYPE}:0", "--only", "int", "--tokens", "1"]
    shown = CliRunner().invoke(app, [*words, "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["device"] == "fake card"
    assert [(row["dtype"], row["experts"]) for row in found["rows"]] == [
        ("int4", 3), ("int4", 2), ("int8", 3), ("int8", 2),
    ]  # fmt: skip
    assert "of read rate" in CliRunner().invoke(app, words).stdout
    refused = CliRunner().invoke(app, [*words[:-2], "--shape", "large"])
    assert refused.exit_code == 2
    assert "shapes are small" in refused.output.replace("\n", " ")


def test_every_cut_of_one_token_is_timed_by_itself(cards: Cards) -> None:
    """Also that of one launch, which a session takes only where it was found to be faster."""
    findings = Findings()
    cuts_of_one_token(findings, torch.device(f"{DEVICE_TYPE}:0"), SMALL, "int4")
    rows = findings.tables["one token an expert"]
    assert [(row["cut"], row["experts"]) for row in rows] == [
        ("several", 3), ("several", 2), ("one launch", 3), ("one launch", 2),
    ]  # fmt: skip
    assert not findings.problems


def test_what_does_not_fit_is_left_out(cards: Cards) -> None:
    cards.card_bytes = 2 << 20
    assert card.kernel_rates(f"{DEVICE_TYPE}:0", [Shape("large", 4096, 4096, 2)], ["bfloat16"], [1]) == []


def test_wrong_kernels_are_not_timed(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamedKernels, "run_group", lambda *arguments: arguments[-1].zero_())
    with pytest.raises(ParityError, match="not timed"):
        card.kernel_rates(f"{DEVICE_TYPE}:0", [SMALL], ["int4"], [1])


def test_without_triton_there_is_an_error(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_choice, "load_fused", lambda: None)
    with pytest.raises(HybriMoEError, match=r"hybrimoe\[gpu\]"):
        card.kernel_rates(f"{DEVICE_TYPE}:0")


@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
def test_random_slots_hold_weights_of_the_usual_size(dtype: str) -> None:
    spec = ExpertSpec(128, 64, dtype)  # type: ignore[arg-type]
    up = unpack_expert(spec, card.random_slots(spec, 2, HOST)[1]).up.float()
    assert 0.5 * card.WEIGHT_SIZE < float(up.std()) < 2 * card.WEIGHT_SIZE
