"""The prefix cache: any prompt reuses what any earlier one computed, and its reply is the one that it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DeepseekV32Config

from hybrimoe.amounts import Amount
from hybrimoe.errors import BudgetError
from hybrimoe.generation import TextGenerator
from hybrimoe.generation.growing import GrowingLayer
from hybrimoe.generation.kv_cache import CHECKPOINT_TAIL_TOKENS
from hybrimoe.generation.prefix.blocks import BLOCK_TOKENS, Known, PrefixTree
from hybrimoe.generation.prefix.budget import prefix_budget_bytes
from hybrimoe.generation.prefix.states import Checkpoint
from tests.hybrimoe.generation.prefix_replies import (
    FAMILIES,
    GREEDY,
    PLENTY,
    SYSTEM,
    Counting,
    Letters,
    has_plain_layers_only,
    made,
)


@pytest.fixture(scope="module", params=FAMILIES)
def generator(request: pytest.FixtureRequest) -> Iterator[TextGenerator]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made(request.param)
    torch.set_num_threads(threads)


def test_any_prompt_reuses_what_any_earlier_one_computed(generator: TextGenerator) -> None:
    counting = Counting(generator)
    plain = has_plain_layers_only(generator)
    first, second, third = ([*SYSTEM, *range(60 + 9 * n, 69 + 9 * n)] for n in range(3))
    (reply,) = counting.answers(first)
    assert reply.n_reused == 0
    turn = [*first, *reply.token_ids[:-1]]
    assert counting.answers([*turn, 7, 8, 9])[0].n_reused == len(turn), "the reply's own tokens, too"
    assert counting.answers(second)[0].n_reused == (len(SYSTEM) if plain else 0)
    assert counting.answers(third)[0].n_reused == len(SYSTEM), "where two texts parted, the states are kept"
    edited = [*first[:80], 3, *first[81:]]
    assert counting.answers(edited)[0].n_reused == (80 if plain else 0)
    assert counting.answers([*turn, 7, 8, 9, 10])[0].n_reused >= len(turn), "and the first conversation is whole"


def test_replies_to_one_prompt_at_the_same_time_compute_it_once(generator: TextGenerator) -> None:
    counting = Counting(generator, parallel=3)
    replies = counting.answers(*[SYSTEM] * 4)
    again = 0 if has_plain_layers_only(generator) else CHECKPOINT_TAIL_TOKENS
    assert [len(SYSTEM) - reply.n_reused for reply in replies] == [len(SYSTEM), again, again, again]
    assert (counting.tree.n_hits, counting.tree.n_misses) == (3, 1)


def test_a_small_budget_keeps_what_fits_and_replies_stay_right() -> None:
    generator = made("gpt_oss")
    counting = Counting(generator, max_bytes=BLOCK_TOKENS * generator.token_bytes() * 2)
    for number in range(4):
        counting.answers([number + 4, *SYSTEM], [number + 40, *SYSTEM])
        assert counting.tree.n_bytes <= counting.tree.max_bytes
    assert counting.tree.n_evicted > 0


def test_speculation_leaves_no_drafted_tokens() -> None:
    model = made("qwen2_moe").model
    counting = Counting(TextGenerator(model, Letters(), speculate=True))
    options = replace(GREEDY, max_new_tokens=40)
    (reply,) = counting.answers(SYSTEM, options=options)
    assert reply.speculation.drafts > 0
    text = [*SYSTEM, *reply.token_ids]
    assert counting.tree.look_up([*text, 1]).n_tokens == len(text) - 1


def test_models_whose_states_are_no_blocks_compute_anew_and_say_why() -> None:
    assert "index" in str(PrefixTree(AutoModelForCausalLM.from_config(small_indexed()), PLENTY).reason)
    counting = Counting(made("unlimited_ocr"))
    assert counting.tree.reason
    assert [reply.n_reused for reply in counting.answers(SYSTEM[:20], SYSTEM[:20])] == [0, 0]
    assert counting.tree.n_bytes == 0


def small_indexed() -> DeepseekV32Config:
    return DeepseekV32Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=8,
        q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_group=2, topk_group=1,
    )  # fmt: skip


def test_the_budget_is_half_of_what_keys_and_values_leave(tiny_model: Any) -> None:
    auto = prefix_budget_bytes(tiny_model, Amount("auto"), 0)
    assert 0 < prefix_budget_bytes(tiny_model, Amount("auto"), auto) < 0.8 * auto
    assert prefix_budget_bytes(tiny_model, Amount("auto"), 1 << 50) == 0
    assert prefix_budget_bytes(tiny_model, Amount("none"), 0) == 0
    assert prefix_budget_bytes(tiny_model, Amount("bytes", 1 << 20), 0) == 1 << 20
    with pytest.raises(BudgetError, match=r"prefix_cache: 7B is 7 bytes, and 64 tokens take \d+"):
        prefix_budget_bytes(tiny_model, Amount("bytes", 7), 0)


class TestTree:
    """Against a list of all that was kept, with layers whose keys tell the token and its place."""

    texts = st.lists(st.integers(0, 1), min_size=0, max_size=3).flatmap(
        lambda blocks: st.tuples(st.just(blocks), st.integers(0, BLOCK_TOKENS), st.integers(0, 2))
    )
    """Texts that share whole blocks and parts of them: numbers of blocks, then a piece of a further one."""

    @staticmethod
    def text(blocks: list[int], n_rest: int, number: int) -> list[int]:
        whole = [100 * block + n for block in blocks for n in range(BLOCK_TOKENS)]
        rest = [100 * (number % 2) + n for n in range(n_rest)]
        return [*whole, *(rest[:-1] if number == 2 else rest), *([7] if number == 2 else [])]

    @staticmethod
    def layer(token_ids: list[int]) -> GrowingLayer:
        layer = GrowingLayer()
        places = torch.arange(len(token_ids))
        values = torch.stack([torch.tensor(token_ids), places], -1).float()
        layer.update(values[None, None], -values[None, None])
        return layer

    def held(self, found: Known, first: int) -> torch.Tensor:
        parts = [keys for keys, values in found.parts(0, first) if torch.equal(keys, -values)]
        return torch.cat(parts, -2) if parts else torch.zeros(1, 1, 0, 2)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(texts, max_size=12), st.integers(2, 30), st.booleans())
    def test_the_longest_kept_beginning_is_found(
        self, tiny_model: Any, drawn: list[Any], n_fit: int, unlimited: bool
    ) -> None:
        block_bytes = BLOCK_TOKENS * (4 * 4 + 40)
        tree = PrefixTree(tiny_model, PLENTY if unlimited else n_fit * block_bytes // 4)
        kept: list[list[int]] = []
        for one in drawn:
            token_ids = self.text(*one)
            found = tree.look_up([*token_ids, -1])
            alike = [n_alike(token_ids, text) for text in kept]
            longest = max(alike, default=0)
            assert found.n_tokens == longest if unlimited else found.n_tokens <= longest
            if token_ids:
                first = found.n_tokens // 3
                assert torch.equal(self.held(found, first), self.layer(token_ids).keys[..., first : found.n_tokens, :])
                tree.keep(token_ids, [self.layer(token_ids)])
            kept.append(token_ids)
            assert tree.n_bytes == sum(block.n_bytes() for block in self.blocks(tree)) <= tree.max_bytes
            assert tree.n_blocks == len(list(self.blocks(tree)))

    def blocks(self, tree: PrefixTree) -> Iterator[Any]:
        """All blocks, reached from the root, none of which is older than its children."""
        order = {entry: number for number, entry in enumerate(tree._by_use)}
        waiting = [tree._root]
        while waiting:
            block = waiting.pop()
            waiting += block.children.values()
            if block.parent is not None:
                assert all(order[child] < order[block] for child in block.children.values())
                assert all(order[one] < order[block] for one in block.checkpoints.values())
                yield block

    def test_the_longest_unused_end_leaves_first(self, tiny_model: Any) -> None:
        texts = [self.text([0, number], 0, 0) for number in (0, 1)]
        tree = PrefixTree(tiny_model, 3 * BLOCK_TOKENS * (4 * 4 + 40))
        for text in texts:
            tree.keep(text, [self.layer(text)])
        tree.look_up(texts[0])
        other = [50, *texts[0][1:BLOCK_TOKENS]]
        tree.keep(other, [self.layer(other)])
        assert [tree.look_up([*text, -1]).n_tokens for text in (*texts, other)] == [
            2 * BLOCK_TOKENS,
            BLOCK_TOKENS,
            BLOCK_TOKENS,
        ]
        assert tree.n_evicted == 1

    def test_checkpoints_move_to_the_block_that_goes_on(self, tiny_model: Any) -> None:
        tree = PrefixTree(tiny_model, PLENTY)
        tree._needs_checkpoints = True
        short, long = self.text([0], 20, 0), self.text([0], 50, 0)
        states = GrowingLayer()
        states.update(*[torch.zeros(1, 1, 8, 2)] * 2)
        for text, place in ((short, 70), (long, 100)):
            tree.keep(text, [self.layer(text)], [Checkpoint(place, {1: states})])
        assert [tree.look_up(long[: n + 1]).n_tokens for n in (69, 70, 99, 100, 113)] == [0, 70, 70, 100, 100]
        assert tree.look_up(long[:70]).n_tokens == 0, "without logits the last token is computed"
        assert tree.look_up([*long[:99], -1]).n_seen == 99
        assert tree.n_blocks == 2


def n_alike(left: list[int], right: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def test_a_checkpoint_stays_as_it_was_when_its_window_is_written_over() -> None:
    """The compiled step writes a window in place, and moves its last tokens to the front when the buffer is full."""
    from hybrimoe.generation.growing import GrowingWindowLayer
    from hybrimoe.generation.prefix.states import checkpoint_of, copied

    def token(n: int) -> list[torch.Tensor]:
        return [torch.full((1, 1, 1, 2), float(n))] * 2

    layer = GrowingWindowLayer(4)
    layer.update(*token(0))
    for n in range(1, 600):
        buffers = layer.grown(1)
        for buffer, new in zip(buffers[:2], token(n), strict=True):
            buffer[..., layer._n_used : layer._n_used + 1, :] = new
        layer.advance(1)
        if n == 9:
            point = checkpoint_of(10, [layer])
    again = copied(point.layers[0], "cpu")
    assert again.keys[0, 0, :, 0].tolist() == [7, 8, 9]
    assert again.get_seq_length() == 10
    assert point.n_bytes() < 200
