import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from hybrimoe.demo.training.balance_loss import balance_loss, layer_load, load_entropy, router_z_loss

CERTAIN = 20.0


def always(expert: int, num_experts: int = 4, tokens: int = 8) -> torch.Tensor:
    logits = torch.zeros(tokens, num_experts)
    logits[:, expert] = CERTAIN
    return logits


def in_turn(num_experts: int = 4, tokens: int = 8) -> torch.Tensor:
    return CERTAIN * torch.eye(num_experts).repeat(tokens // num_experts, 1)


def test_uniform_routing_gives_one():
    assert balance_loss([in_turn(), in_turn()], top_k=1).item() == pytest.approx(1.0)


def test_a_collapsed_layer_costs_as_many_times_as_there_are_experts():
    assert balance_loss([always(2)], top_k=1).item() == pytest.approx(4.0, rel=1e-5)


def test_a_collapsed_layer_is_seen_even_if_others_make_up_for_it():
    layers = tuple(always(expert) for expert in range(4))
    theirs = load_balancing_loss_func(layers, num_experts=4, top_k=1)
    assert float(theirs) == pytest.approx(1.0, rel=1e-5), "summed over layers the collapse cancels out"
    assert balance_loss(layers, top_k=1).item() == pytest.approx(4.0, rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 8))
def test_agrees_with_transformers_on_a_single_layer_up_to_its_factor_top_k(seed, num_experts):
    logits = torch.randn(16, num_experts, generator=torch.Generator().manual_seed(seed))
    theirs = load_balancing_loss_func((logits,), num_experts=num_experts, top_k=2)
    assert float(theirs) / 2 == pytest.approx(balance_loss([logits], top_k=2).item(), rel=1e-5)


def test_its_gradient_moves_tokens_away_from_a_crowded_expert():
    logits = (always(0) / 10 + 0.01 * torch.arange(4)).requires_grad_()
    balance_loss([logits], top_k=1).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_each_layer_has_the_same_weight_in_the_gradient():
    first, second = (always(0) / 10).requires_grad_(), (always(0) / 10).requires_grad_()
    balance_loss([first, second], top_k=1).backward()
    assert torch.equal(first.grad, second.grad)


def test_load_counts_every_choice():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
    assert layer_load(logits, top_k=2).tolist() == [0.5, 0.25, 0.25]


def test_entropy_is_one_for_uniform_and_zero_for_a_single_expert():
    assert load_entropy(torch.full((8,), 1 / 8)) == pytest.approx(1.0)
    assert load_entropy(torch.eye(8)[3]) == pytest.approx(0.0)


def test_z_loss_is_the_mean_square_of_the_log_sum_exp():
    logits = torch.zeros(5, 4)
    assert router_z_loss([logits, logits + 1]).item() == pytest.approx(
        (math.log(4) ** 2 + (math.log(4) + 1) ** 2) / 2, rel=1e-5
    )
