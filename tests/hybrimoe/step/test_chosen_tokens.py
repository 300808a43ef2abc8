"""Attention to the tokens that an index chooses, compiled: contexts longer than it chooses, and what is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek

import hybrimoe
from cpu_kernels.errors import ActivationValueError
from hybrimoe.generation.growing import GrowingIndexedLayer, growing_cache
from hybrimoe.step.step import Step

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import VOCABULARY, tiny_model

TOP_K, CONTEXT, NEW = 12, 120, 40
MANY_HEADS = {"index_topk": TOP_K, "index_n_heads": 24, "max_position_embeddings": 512}
"""So many heads that no two scores are 0: torch does not say which of equal scores it takes."""
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v32": {},
    "glm_moe_dsa": {"num_hidden_layers": 4, "mlp_layer_types": ["sparse"] * 4,
                    "indexer_types": ["full", "shared", "shared", "full"]},
    "dots3_note": {},
}  # fmt: skip
TOLERANCE = 1e-4
PADDINGS = {
    "whole": [],
    "before": [(0, 0, 9), (1, 0, CONTEXT - 8)],
    "behind": [(0, CONTEXT - 30, CONTEXT), (2, TOP_K - 3, CONTEXT)],
}
"""Padding of a batch: (sequence, first token, the one after the last). Some leave fewer tokens than are chosen."""


def small(family: str, **more: Any) -> Any:
    return tiny_model(family, **{**MANY_HEADS, **FAMILIES[family], **more})


def injected(family: str, **more: Any) -> Any:
    model = small(family, **more)
    hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    assert isinstance(model.hybrimoe.step, Step), model.hybrimoe.way
    return model


def greedy(model: Any, batch: int, padding: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, tokens) of NEW decode steps behind a prompt of CONTEXT tokens; none of those that are embedded as zeros,
    whose scores are."""
    ids = torch.randint(3, VOCABULARY, (batch, CONTEXT), generator=torch.Generator().manual_seed(3))
    mask, cache, logits, tokens = torch.ones_like(ids), DynamicCache(config=model.config), [], [ids]
    for sequence, first, stop in padding:
        mask[sequence, first:stop] = 0
    with torch.no_grad():
        for _ in range(NEW + 1):
            new = tokens[-1]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            output = model(input_ids=new, past_key_values=cache, attention_mask=mask, position_ids=positions)
            logits.append(output.logits[:, -1:])
            tokens.append(3 + logits[-1][..., 3:].argmax(-1))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
    return torch.cat(logits[1:], 1), torch.cat(tokens[2:], 1)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_in_contexts_that_are_longer_than_what_is_chosen(family: str, padding: str) -> None:
    logits, tokens = greedy(small(family), 3, PADDINGS[padding])
    model = injected(family)
    found_logits, found = greedy(model, 3, PADDINGS[padding])
    assert model.hybrimoe.step.n_steps == NEW
    assert float((logits - found_logits).abs().max()) <= TOLERANCE
    assert torch.equal(tokens, found)
    everything, _ = greedy(small(family, index_topk=512), 3, PADDINGS[padding])
    assert float((logits - everything).abs().max()) > 1e-3  # the choice matters


def test_sixteen_sequences_and_several_tokens_at_once() -> None:
    plain, model = small("deepseek_v32"), injected("deepseek_v32")
    generator = torch.Generator().manual_seed(4)
    for batch, n_new in ((16, 1), (1, 16), (3, 5)):
        ids = torch.randint(3, VOCABULARY, (batch, 40 + n_new), generator=generator)
        found = []
        for each in (plain, model):
            cache = DynamicCache(config=each.config)
            with torch.no_grad():
                each(input_ids=ids[:, :40], past_key_values=cache)
                found.append(each(input_ids=ids[:, 40:], past_key_values=cache).logits)
        assert float((found[0] - found[1]).abs().max()) <= TOLERANCE, (batch, n_new)
    assert model.hybrimoe.step.n_steps == 3


def test_the_first_token_of_a_conversation_and_tokens_taken_back() -> None:
    """Without a prompt before, in parts that are longer than what is chosen, with guesses that were wrong."""
    plain, model = small("glm_moe_dsa"), injected("glm_moe_dsa")
    ids = torch.randint(3, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(4))
    cache, step = growing_cache(model.config), model.hybrimoe.step
    logits = step.next_logits(ids[0, :50].tolist(), cache)
    step.next_logits(ids[0, 40:47].tolist(), cache, drafted=True)
    for layer in cache.layers:
        layer.retract(7)
    with torch.no_grad():
        expected = plain(input_ids=ids).logits[0]
    assert float((logits[0] - expected[49]).abs().max()) <= TOLERANCE
    for number in range(50, 60):
        logits = step.next_logits([int(ids[0, number])], cache)
        assert float((logits[0] - expected[number]).abs().max()) <= TOLERANCE
    assert cache.layers[0].n_indexed == 60
    with torch.inference_mode():  # transformers goes on from what the step left
        again = model(input_ids=ids, past_key_values=cache, output_hidden_states=True).logits
        cache.crop(-60)
        assert torch.equal(again, model(input_ids=ids, past_key_values=cache, output_hidden_states=True).logits)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_bits_do_not_depend_on_the_threads(dtype: str) -> None:
    model = small("glm_moe_dsa")
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype=dtype, dense_dtype="int8")
    assert isinstance(injection.step, Step), injection.way
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(input_ids=torch.arange(3, 80)[None], past_key_values=cache)
    for threads in (1, 2, 3):
        step = Step(model, injection.session, injection.step.reading, threads)
        own = copy.deepcopy(cache)
        found.append(torch.stack([step.next_logits(tokens, own)[0] for tokens in ([5], [6, 7, 8], [9])]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("part", ["keys", "indexer_keys"])
def test_nan_in_a_cache_is_named_and_leaves_the_cache_as_it_was(part: str) -> None:
    model = injected("deepseek_v32")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 60)[None], past_key_values=cache)
    model.hybrimoe.step.next_logits([5], cache)
    layer = cache.layers[1]
    assert isinstance(layer, GrowingIndexedLayer)
    held = getattr(layer, part)
    setattr(layer, part, torch.full_like(held, torch.nan))
    with pytest.raises(ActivationValueError, match=r"layer 1: .* NaN in the KV cache"):
        model.hybrimoe.step.next_logits([6], cache)
    setattr(layer, part, held)
    twin = copy.deepcopy(cache)
    assert (layer.get_seq_length(), layer.n_indexed) == (58, 58)
    assert torch.equal(model.hybrimoe.step.next_logits([6], cache), model.hybrimoe.step.next_logits([6], twin))


def test_caches_of_another_kind_are_left_to_transformers() -> None:
    model = injected("deepseek_v32")
    step = model.hybrimoe.step
    cache = growing_cache(model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 60)[None], past_key_values=cache)
    assert step.next_logits([5], copy.deepcopy(cache)) is not None
    cache.layers[0].indexer_keys = cache.layers[0].indexer_keys[:, :-1]
    assert step.next_logits([5], cache) is None
    assert cache.get_seq_length() == 57


def test_layers_beside_one_that_is_not_understood() -> None:
    """A mixed step: the choice of a layer that transformers computes is not known to a layer that shares it."""
    spoiled: list[Any] = []
    for family in ("deepseek_v32", "glm_moe_dsa"):
        plain, model = small(family), small(family)
        for each in (plain, model):
            each.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, __, out: 1.5 * out)
        injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
        ways = injection.explain().ways
        assert ways["model.layers.0"].startswith("mlp compiled; the rest by transformers"), ways
        logits, tokens = greedy(plain, 2, [])
        found_logits, found = greedy(model, 2, [])
        assert float((logits - found_logits).abs().max()) <= TOLERANCE
        assert torch.equal(tokens, found)
        spoiled.append(ways)
    assert spoiled[0]["model.layers.1"] == "compiled"


# What is refused --------------------------------------------------------------------------------------------------

Forward = Callable[..., torch.Tensor]


def keeps_the_last(own: Forward) -> Forward:
    """The newest of the prompt's tokens is always among those chosen."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        chosen = own(self, *args, **kwargs)
        chosen[..., -1] = 0
        return chosen

    return forward


def without_relu(own: Forward) -> Forward:
    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepseek.F, "relu", lambda x: x)
            return own(self, *args, **kwargs)

    return forward


def grows_with_positions(own: Forward) -> Forward:
    """The keys' order turns around in places far behind what a comparison sees."""

    def forward(self: Any, hidden: torch.Tensor, short: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return own(self, hidden, -short if bool((args[2] > 8192).any()) else short, *args, **kwargs)

    return forward


@pytest.mark.parametrize("change", [keeps_the_last, without_relu, grows_with_positions])
def test_an_index_that_chooses_otherwise_is_refused(
    change: Callable[[Forward], Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a recorded step's tokens are chosen by any index: it is compared with fewer."""
    monkeypatch.setattr(deepseek.DeepseekV32Indexer, "forward", change(deepseek.DeepseekV32Indexer.forward))
    plain = small("deepseek_v32", index_topk=32)
    model = small("deepseek_v32", index_topk=32)
    ways = hybrimoe.inject(model, accelerator="none", expert_dtype="float32").explain().ways
    assert all("self_attn: " in way for way in ways.values()), ways
    assert torch.equal(greedy(model, 1, [])[1], greedy(plain, 1, [])[1])


def test_equal_scores_do_not_refuse_an_index() -> None:
    """Two heads leave many scores at 0, of which torch takes some and the step the first."""
    injected("deepseek_v32", index_n_heads=2, index_topk=6)


def test_an_index_whose_scores_are_all_equal_is_refused() -> None:
    model = small("deepseek_v32")
    with torch.no_grad():
        model.model.layers[1].self_attn.indexer.weights_proj.weight.zero_()
    ways = hybrimoe.inject(model, accelerator="none", expert_dtype="float32").explain().ways
    assert ways["model.layers.0"] == "compiled"
    assert "their scores are equal" in ways["model.layers.1"]
