"""Attention of prompts that go on from a cache, against float64; stored rows that stand where floats are expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpu_kernels.backends import prompt_attention as module
from cpu_kernels.backends.prompt_attention import prompt_attention, supports_prompt_attention
from cpu_kernels.errors import LayoutError
from cpu_kernels.step.kv_rows import store_tokens, turned
from cpu_kernels.step.states.stored import StoredStates
from cpu_kernels.step.stored import KIND_OF, row_bytes

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative error against float64 of the same keys and values; of bfloat16 half a percent is the rounding of scores."""
DIM = 64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(name: str, floats: torch.Tensor, dtype: torch.dtype) -> StoredStates:
    kind = KIND_OF[name]
    rows = torch.zeros(*floats.shape[:3], row_bytes(kind, floats.shape[3]), dtype=torch.uint8)
    store_tokens(kind, floats, rows)
    return StoredStates.of(rows, kind, floats.to(dtype))


def expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    group, n_past = query.shape[1] // keys.shape[1], keys.shape[2] - query.shape[2]
    keys, values = (part.double().repeat_interleave(group, 1) for part in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) / DIM**0.5
    hidden = torch.ones_like(scores, dtype=torch.bool).triu_(n_past + 1)
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ values


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4", None])
@pytest.mark.parametrize(("n_new", "n_past", "group"), [(1, 9, 1), (5, 0, 2), (40, 3, 1), (33, 700, 3), (64, 256, 4)])
def test_blocks_give_what_all_at_once_gives(
    name: str | None, n_new: int, n_past: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    query = normal(2, 2 * group, n_new, DIM)
    keys, values = (normal(2, 2, n_past + n_new, DIM, seed=seed) for seed in (1, 2))
    keys[..., 3] *= 4
    for dtype, tolerance in TOLERANCES.items():
        asked = query.to(dtype)
        held = [part.to(dtype) if name is None else stored(name, part, dtype) for part in (keys, values)]
        floats = [part if name is None else part.floats() for part in held]  # type: ignore[attr-defined]
        found = prompt_attention(asked, held[0], held[1], DIM**-0.5, dtype=dtype)
        assert found.dtype == dtype
        assert error(found, expected(asked, *floats)) <= tolerance
        if dtype == torch.bfloat16:  # on CPUs that have no products of bfloat16
            wide = prompt_attention(asked, held[0], held[1], DIM**-0.5, dtype=torch.float32)
            assert error(wide, expected(asked, *floats)) <= tolerance


def test_the_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    query, (keys, values) = normal(1, 4, 17, DIM), (stored("int8", normal(1, 2, 600, DIM), torch.float32),) * 2
    before, found = torch.get_num_threads(), []
    try:
        for of_torch, threads in ((1, 1), (2, None), (3, None)):
            torch.set_num_threads(of_torch)
            found.append(prompt_attention(query, keys, values, 0.1, threads=threads))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_no_floats_are_made_of_all_that_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    longest = []
    original = StoredStates.block

    def block(self: StoredStates, first: int, stop: int, dtype: torch.dtype, threads: int | None) -> torch.Tensor:
        longest.append(stop - first)
        return original(self, first, stop, dtype, threads)

    monkeypatch.setattr(StoredStates, "block", block)
    monkeypatch.delattr(StoredStates, "floats")
    keys = stored("int4", normal(1, 2, 2000, DIM), torch.bfloat16)
    prompt_attention(normal(1, 2, 30, DIM).bfloat16(), keys, keys, 0.1, dtype=torch.bfloat16)
    assert max(longest) == module.LEAST_BLOCK_TOKENS


def test_stored_states_are_floats_to_all_of_torch() -> None:
    floats = normal(1, 2, 20, DIM)
    for name in KIND_OF:
        states = stored(name, floats, torch.float32)
        assert (states.shape, states.dtype, states.dim(), states.size(2)) == (floats.shape, torch.float32, 4, 20)
        assert states._floats is None
        known = states.floats()
        query = normal(1, 2, 3, DIM)
        attended = torch.nn.functional.scaled_dot_product_attention(query, states, states)
        assert torch.equal(attended, torch.nn.functional.scaled_dot_product_attention(query, known, known))
        assert torch.equal(states.transpose(1, 2).contiguous(), known.transpose(1, 2))
        assert torch.equal(states[:, :, 5:], known[:, :, 5:])
        assert torch.equal(torch.cat([states, floats], 2)[:, :, :20], known)
        assert not isinstance(states + 1, StoredStates)
    with torch.inference_mode():
        states = stored("int8", floats, torch.float16)
        assert torch.equal(query @ states.float().transpose(2, 3), query @ states.floats().float().transpose(2, 3))


@pytest.mark.parametrize("n", [8, 24, 64, 96])
def test_turning_twice_gives_the_same(n: int) -> None:
    floats = normal(1, 2, 5, n)
    once = turned(floats)
    assert torch.allclose(once.norm(dim=-1), floats.norm(dim=-1))
    assert not torch.allclose(once, floats)
    assert torch.allclose(turned(once), floats, atol=1e-6)
    assert torch.equal(turned(floats.transpose(1, 3).contiguous().transpose(1, 3)), once)


def test_what_does_not_fit_is_refused() -> None:
    query, keys = normal(1, 4, 3, DIM), normal(1, 2, 9, DIM)
    for wrong in (
        keys.double(),
        keys[..., :32],
        keys[:, :, :2],
        keys[:, [0, 1, 1]],
        stored("int8", keys, torch.float32),
    ):
        assert not supports_prompt_attention(query, wrong, keys)
    with pytest.raises(LayoutError, match=r"n <= T; found torch.float32\[1, 4, 3, 64\]"):
        prompt_attention(query, keys[:, :, :2], keys[:, :, :2], 1.0)


def test_a_long_past_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is made into floats: torch's kernel copies all that it is given at once."""
    monkeypatch.setattr(module, "_block_tokens", lambda *_: 8)
    attend, sizes = module._attend, []

    def counted(query: torch.Tensor, keys: torch.Tensor, *others: Any, **named: Any) -> Any:
        sizes.append(keys.shape[2])
        return attend(query, keys, *others, **named)

    monkeypatch.setattr(module, "_attend", counted)
    keys = normal(1, 2, 30, DIM)
    prompt_attention(normal(1, 2, 9, DIM), keys, keys, 0.1)
    assert sizes == [9, 8, 8, 5]
