"""torch's threads in decode steps: one where its work is small, the user's number everywhere else."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hybrimoe.dense.calls import MAX_TOKENS
from hybrimoe.dense.threads import LITTLE_BYTES, FewThreads


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


def has(n_threads: int) -> None:
    """This thread's operators run on so many: the first time that it is asked, torch takes the newest number of all."""
    torch.get_num_threads()
    torch.set_num_threads(n_threads)


def test_calls_on_several_threads_give_each_its_own_number_back() -> None:
    """The first call begins before the second and ends while that is under way."""
    first_began, second_began, first_ended = (threading.Event() for _ in range(3))

    class Meeting(Model):
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> None:
            began, awaited = (first_began, second_began) if input_ids[0, 0] == 1 else (second_began, first_ended)
            began.set()
            assert awaited.wait(600)

    model, after = Meeting(), {}
    FewThreads(model)

    def first() -> None:
        has(2)
        model(ids(1) + 1)
        after["first"] = torch.get_num_threads()
        first_ended.set()

    def second() -> None:
        assert first_began.wait(600)
        has(3)
        model(ids(1) + 2)
        after["second"] = torch.get_num_threads()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert after == {"first": 2, "second": 3}
