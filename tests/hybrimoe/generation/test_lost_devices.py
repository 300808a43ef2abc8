"""A device that hangs or fails in the middle of a reply: the CPU goes on with the same tokens, or there is an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import hybrimoe
from gpu_kernels import EmulatedAccelerator, LostError
from gpu_kernels.streams import HostEvent
from hybrimoe.generation import SamplingOptions, TextGenerator
from tests.fake_device import DEVICE_TYPE, fake_cards
from tests.hybrimoe.generation.test_on_cards import PROMPT, greedy, save_model

CARD = f"{DEVICE_TYPE}:0"
WAIT_S = 0.5
MOST_S = 20.0
N_TOKENS, N_BEFORE = 16, 5


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Callable[[Path], Path]) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path / "cache")))


@pytest.fixture
def held() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def opened(folder: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> TextGenerator:
    settings = {"progress": False, "expert_dtype": "float32", "backend": "torch", "device_wait_seconds": WAIT_S}
    model = hybrimoe.load(save_model(folder / "model", "float32"), **settings | options)
    return TextGenerator(model, tokenizer, prefill_chunk_tokens=40)


def reply(generator: TextGenerator) -> Any:
    return generator.reply(PROMPT, SamplingOptions(temperature=0.0, max_new_tokens=N_TOKENS))


def read(pieces: Iterable[Any]) -> None:
    for _ in pieces:
        pass


@pytest.mark.parametrize("lane", ["copy", "compute"])
@pytest.mark.parametrize("policy", ["ours", "on_demand/none/lru"])
def test_the_cpu_goes_on_with_a_reply(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, held: threading.Event,
    lane: str, policy: str,
) -> None:  # fmt: skip
    generator = opened(tmp_path, byte_tokenizer, accelerator="emulated", gpu_expert_slots=8, policy=policy)
    words, begun = reply(generator), time.monotonic()
    pieces = iter(words)
    for _ in range(N_BEFORE):
        next(pieces)
    accelerator = generator.model.hybrimoe.session.accelerators[0]
    if lane == "copy":
        monkeypatch.setattr(EmulatedAccelerator, "_transfer", lambda *_: held.wait())
    else:
        accelerator._compute.submit(lambda event: held.wait(), HostEvent())
    with pytest.warns(RuntimeWarning, match="hangs") as warned:
        read(pieces)
    assert len([one for one in warned if "The CPU computes all experts" in str(one.message)]) == 1
    assert time.monotonic() - begun < MOST_S
    assert generator.model.hybrimoe.session.lost is not None
    generator.model.hybrimoe.session.close()
    assert words.token_ids == greedy(tmp_path / "model", byte_tokenizer, n_tokens=N_TOKENS, accelerator="none")[0]


@pytest.mark.parametrize("slots", [8, 1.0])
@pytest.mark.parametrize("how", ["copy", "compute", "lost"])
@pytest.mark.parametrize("step", ["auto", "transformers"])
def test_a_card_that_has_the_model_ends_the_reply(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, how: str, slots: int | float, step: str
) -> None:
    with fake_cards(1) as cards:
        generator = opened(
            tmp_path, byte_tokenizer, accelerator=CARD, gpu_expert_slots=slots, step=step, policy="on_demand/none/lru"
        )
        session = generator.model.hybrimoe.session
        words = reply(generator)
        pieces = iter(words)
        for _ in range(N_BEFORE):
            next(pieces)
        if how == "lost":
            cards.lose(0)
        else:
            stream = session.accelerators[0]._copy_stream if how == "copy" else cards.stream(0)
            stream.hang()
        begun = time.monotonic()
        if how == "copy" and slots == 1.0:  # nothing is copied any more
            read(pieces)
            assert len(words.token_ids) == N_TOKENS
        else:
            with pytest.raises((LostError, torch.AcceleratorError), match=r"hangs|has failed|unspecified launch"):
                read(pieces)
            assert time.monotonic() - begun < MOST_S
            begun = time.monotonic()
            with pytest.raises((LostError, torch.AcceleratorError)):
                read(reply(generator))
            assert time.monotonic() - begun < MOST_S
        begun = time.monotonic()
        session.close()
        assert time.monotonic() - begun < MOST_S
