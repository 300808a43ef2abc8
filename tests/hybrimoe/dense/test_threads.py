"""torch's threads in decode steps: one where its work is small, the user's number everywhere else."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hybrimoe.dense.threads import LITTLE_BYTES, MAX_TOKENS, FewThreads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Model(nn.Module):
    """Says how many threads torch had in its calls."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.seen: list[int] = []

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> None:
        self.seen.append(torch.get_num_threads())
        if input_ids is None and inputs_embeds is None:
            raise RuntimeError("nothing to compute")

    def generate(self, n_prompt: int, n_new: int) -> int:
        """As transformers does it: a prompt, then single tokens, and something in between. Returns torch's threads."""
        self(ids(n_prompt))
        for _ in range(n_new):
            self.seen.append(torch.get_num_threads())
            self(ids(1))
        return torch.get_num_threads()


def ids(n: int) -> torch.Tensor:
    return torch.zeros(1, n, dtype=torch.int64)


def test_decode_steps_have_one_thread_and_prompts_have_all() -> None:
    model = Model()
    few = FewThreads(model)
    model(ids(1))
    model(input_ids=ids(MAX_TOKENS))
    model(inputs_embeds=torch.zeros(1, 2, 8))
    model(ids(MAX_TOKENS + 1))
    assert model.seen == [1, 1, 1, 2]
    assert torch.get_num_threads() == 2
    few.undo()
    model(ids(1))
    assert model.seen[-1] == 2


def test_a_call_that_fails_gives_the_threads_back() -> None:
    model = Model()
    FewThreads(model)
    with pytest.raises(RuntimeError, match="nothing"):
        model()
    with pytest.raises(TypeError):
        model(ids(1), unknown=1)
    assert torch.get_num_threads() == 2
    model(ids(1))
    assert (model.seen[-1], torch.get_num_threads()) == (1, 2)


def test_large_layers_of_torch_keep_their_threads() -> None:
    """One thread would read them at a fraction of the memory's rate."""
    with torch.device("meta"):
        on_another_device = Model(4096)
    assert FewThreads(on_another_device).applies
    model = Model(int((LITTLE_BYTES / 4) ** 0.5) + 1)
    assert not FewThreads(model).applies
    model(ids(1))
    assert model.seen == [2]


def test_generate_has_one_thread_but_for_its_prompt() -> None:
    model = Model()
    few = FewThreads(model)
    assert model.generate(MAX_TOKENS + 1, 2) == 1
    assert model.seen == [2, 1, 1, 1, 1]
    with pytest.raises(TypeError):
        model.generate("no number", 1)
    assert torch.get_num_threads() == 2
    assert model.generate.__doc__ == Model.generate.__doc__
    few.undo()
    assert "generate" not in vars(model)
    assert model.generate(1, 0) == 2


def test_a_copy_generates_with_its_own_calls() -> None:
    model = Model()
    few = FewThreads(model)
    copied = copy.deepcopy(model)
    few.undo()
    assert copied.generate(MAX_TOKENS + 1, 1) == 1
    assert (copied.seen, model.seen) == ([2, 1, 1], [])
