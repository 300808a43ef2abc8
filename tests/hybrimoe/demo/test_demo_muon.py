import pytest
import torch

from hybrimoe.demo.training.muon import UPDATE_RMS, Muon, orthogonalise


@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 24, 8), (1, 16, 16), (3, 2, 5, 7)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (left @ right).flatten(), dim=0) > 0.9


def test_a_stack_of_experts_is_updated_expert_by_expert():
    gradient = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1))
    gradient[1] *= 1000
    stacked = torch.nn.Parameter(torch.zeros(4, 8, 16))
    singles = [torch.nn.Parameter(torch.zeros(8, 16)) for _ in range(4)]
    stacked.grad = gradient
    for single, part in zip(singles, gradient, strict=True):
        single.grad = part
    for parameters in ([stacked], singles):
        Muon(parameters, lr=0.1).step()
    assert torch.allclose(stacked, torch.stack(singles), atol=1e-6)


def test_blocks_cut_the_rows_into_matrices_of_their_own():
    gradient = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
    whole, halves = torch.nn.Parameter(torch.zeros(2, 8, 16)), torch.nn.Parameter(torch.zeros(4, 4, 16))
    whole.grad, halves.grad = gradient, gradient.reshape(4, 4, 16)
    Muon([{"params": [whole], "blocks": 2}], lr=0.1).step()
    Muon([halves], lr=0.1).step()
    assert torch.equal(whole.reshape(4, 4, 16), halves)


def test_an_update_has_the_size_of_one_of_adamw():
    parameter = torch.nn.Parameter(torch.zeros(32, 32))
    parameter.grad = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    Muon([parameter], lr=0.5).step()
    rms = parameter.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(0.5 * UPDATE_RMS, rel=0.25)


def test_weight_decay_shrinks_and_no_gradient_changes_nothing():
    decayed, untouched = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    decayed.grad = torch.zeros(4, 4)
    Muon([decayed, untouched], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(decayed, torch.full((4, 4), 0.95))
    assert torch.equal(untouched, torch.ones(4, 4))
