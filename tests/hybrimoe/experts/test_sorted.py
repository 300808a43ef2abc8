"""Llama-4's call of its experts, computed by the common one, gives its own result."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from cpu_kernels import reference_ffn
from hybrimoe.experts.layout import read
from hybrimoe.experts.sorted import run_sorted

N_TOKENS = 5


@pytest.fixture
def module() -> Llama4TextExperts:
    torch.manual_seed(0)
    experts = Llama4TextExperts(Llama4TextConfig(hidden_size=16, intermediate_size=12, num_local_experts=4))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def routed(module: Llama4TextExperts, calls: list[int]) -> object:
    layout = read(module)

    def experts(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        assert weights.eq(1).all()
        outputs = [
            reference_ffn(layout.spec("float32"), layout.expert(int(e)), row[None])
            for row, e in zip(rows, ids, strict=True)
        ]
        return torch.cat(outputs)

    return experts


def test_only_selected_rows_are_computed(module: Llama4TextExperts) -> None:
    hidden = torch.randn(4, N_TOKENS, 16)
    hidden[0, 1:] = hidden[2] = hidden[3, :2] = 0
    calls: list[int] = []
    with torch.no_grad():
        found = run_sorted(hidden.flatten(0, 1), 4, routed(module, calls))  # type: ignore[arg-type]
        torch.testing.assert_close(found, module(hidden.flatten(0, 1)))
    assert calls == [1 + N_TOKENS + 3]


def test_nothing_selected(module: Llama4TextExperts) -> None:
    calls: list[int] = []
    assert run_sorted(torch.zeros(20, 16), 4, routed(module, calls)).eq(0).all()  # type: ignore[arg-type]
    assert calls == []
