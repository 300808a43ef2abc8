"""Slots on a device with limited memory: KV cache, dense weights and activations come first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hybrimoe.errors import BudgetError
from hybrimoe.runtime.startup.budget import DEVICE_RESERVE_BYTES, KV_TOKENS, auto_slots, kv_cache_bytes, reserve_bytes

MIB = 1 << 20


class Device:
    """Stands for an accelerator with some free memory."""

    name, kind, device = "test device", "cuda", torch.device("cpu")

    def __init__(self, free: int | None) -> None:
        self._free = free

    def free_bytes(self) -> int | None:
        return self._free


class Heterogeneous(SimpleNamespace):
    """A configuration some of whose attributes belong to single layers (transformers raises there)."""

    def __getattr__(self, name: str) -> Any:
        if name == "head_dim":
            raise RuntimeError("'head_dim' is a per-layer attribute")
        raise AttributeError(name)


def model_of(config: object, dense: int = 0, device: str = "cpu") -> nn.Module:
    model = nn.Module()
    model.config = config  # type: ignore[assignment]
    if dense:
        model.dense = nn.Parameter(torch.empty(dense, device=device))
    return model


def test_auto_takes_what_the_reserves_leave() -> None:
    device: Any = Device(2048 * MIB)
    reserve = reserve_bytes(None, device, 512 * MIB, ())
    assert reserve == 512 * MIB + DEVICE_RESERVE_BYTES
    assert auto_slots(10_000, 4 * MIB, device, reserve) == (2048 * MIB - reserve) // (4 * MIB)
    assert auto_slots(7, 4 * MIB, device, reserve) == 7


def test_auto_without_room_says_what_takes_it() -> None:
    device: Any = Device(600 * MIB)
    with pytest.raises(BudgetError, match=r"600 MiB free, of which 1024 MiB are kept.*4\.0 MiB does not fit"):
        auto_slots(64, 4 * MIB, device, reserve_bytes(None, device, 512 * MIB, ()))


def test_weights_still_to_be_loaded_are_kept_free_and_loaded_ones_are_not_counted_twice() -> None:
    device: Any = Device(1 << 40)
    waiting, there = model_of(None, 1 << 20, "meta"), model_of(None, 1 << 20, "cpu")
    assert reserve_bytes(waiting, device, 0, ()) - reserve_bytes(there, device, 0, ()) == 4 << 20


def test_kv_room_follows_the_configuration() -> None:
    config = SimpleNamespace(
        num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=4, hidden_size=2048, head_dim=64,
        max_position_embeddings=131072,
    )  # fmt: skip
    assert kv_cache_bytes(model_of(config)) == 2 * 24 * 4 * 64 * 2 * KV_TOKENS
    config.max_position_embeddings = 1024
    assert kv_cache_bytes(model_of(SimpleNamespace(text_config=config))) == 2 * 24 * 4 * 64 * 2 * 1024
    mixed = Heterogeneous(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, max_position_embeddings=8)
    assert kv_cache_bytes(model_of(mixed)) == 2 * 2 * 4 * 16 * 2 * 8
    assert kv_cache_bytes(model_of(SimpleNamespace())) == kv_cache_bytes(None) == 1 << 30


def test_the_hosts_memory_is_no_limit_of_ours() -> None:
    device: Any = Device(None)
    assert reserve_bytes(None, device, None, ()) == 0
    assert auto_slots(100, MIB, device, 0) == 25
    assert auto_slots(1, MIB, device, 0) == 1
    assert auto_slots(0, MIB, device, 0) == 0
