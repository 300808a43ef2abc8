"""Attention on a card is never cuDNN's, whose plans are made anew for every number of keys."""

from __future__ import annotations

import threading

import torch
from torch import nn

from hybrimoe.dense.card_attention import CardAttention, CudnnAttentionOff
from hybrimoe.dense.place import move
from tests.fake_device import DEVICE_TYPE, fake_cards

enabled = torch.backends.cuda.cudnn_sdp_enabled


class Model(nn.Module):
    """Says whether torch could have chosen cuDNN's attention in its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[bool] = []

    def forward(self, input_ids: torch.Tensor) -> None:
        self.seen.append(enabled())


def test_it_is_off_in_the_calls_of_a_model_on_a_card_only() -> None:
    model, ids = Model(), torch.zeros(1, 3, dtype=torch.int64)
    assert not CardAttention(model).applies
    with fake_cards(1):
        move(model, torch.device(DEVICE_TYPE, 0))
        attention = CardAttention(model)
        assert attention.applies
        model(ids)
        assert enabled()
        attention.undo()
        model(ids)
    assert model.seen == [False, True]


def test_several_threads_leave_the_switch_as_it_was() -> None:
    off, entered, leave = CudnnAttentionOff(), threading.Event(), threading.Event()

    def stay() -> None:
        with off:
            entered.set()
            leave.wait()

    with off:
        thread = threading.Thread(target=stay)
        thread.start()
        entered.wait()
        with off:
            assert not enabled()
    assert not enabled(), "the other thread is still inside"
    leave.set()
    thread.join()
    assert enabled()


def test_a_user_who_has_switched_it_off_finds_it_so() -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with CudnnAttentionOff():
            assert not enabled()
        assert not enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
