"""Tokens found without looking at the whole vocabulary are those of transformers' processors over all of it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hybrimoe.generation import SamplingOptions, sampling
from hybrimoe.generation.drawing import candidates, draws
from hybrimoe.generation.drawing.candidates import first_that_narrows, kept_by
from hybrimoe.generation.drawing.draws import Draws
from hybrimoe.generation.sampling import Sampler

V = 3000
PROCESSORS = [
    *(TopKLogitsWarper(n) for n in (1, 40, 5000)),
    *(TopPLogitsWarper(share) for share in (0.0, 0.1, 0.9, 0.9999)),
    TopPLogitsWarper(0.5, min_tokens_to_keep=3),
]
PROMPT = [5, 17, 17, 200]


def logits_of(kind: str, seed: int) -> torch.Tensor:
    """float32 [V]."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, generator=random)
    if kind == "few":
        return logits.masked_fill(logits < 2.5, -torch.inf)
    if kind == "one":
        return torch.full((V,), -torch.inf).index_fill(0, torch.tensor([seed % V]), 1.0)
    return {"peaked": logits * 5, "even": logits * 0.01, "ties": (logits * 3).round()}[kind]


@given(
    kind=some.sampled_from(["peaked", "even", "ties", "few", "one"]),
    seed=some.integers(0, 2**20),
    processor=some.sampled_from(PROCESSORS),
)
@settings(deadline=None, max_examples=120)
def test_what_is_kept_is_what_the_processor_keeps(kind: str, seed: int, processor: Any) -> None:
    logits = logits_of(kind, seed)
    kept = kept_by(processor, logits.numpy())
    expected = torch.isfinite(processor(None, logits[None]))[0].nonzero()[:, 0].numpy()
    if kept is None:
        assert isinstance(processor, TopPLogitsWarper)
        assert len(expected) >= candidates.LARGEST_NUCLEUS, "only where more tokens stay than were looked at"
    elif kind == "ties" and isinstance(processor, TopPLogitsWarper):  # which of equal ones stays is the sort's choice
        assert sorted(logits[kept].tolist()) == pytest.approx(sorted(logits[expected].tolist()))
    else:
        assert np.array_equal(kept, expected)


def test_where_every_token_is_excluded_the_processor_itself_is_asked() -> None:
    nothing = np.full(V, -np.inf, np.float32)
    assert kept_by(TopKLogitsWarper(3), nothing) is None
    assert kept_by(TopPLogitsWarper(0.9), nothing) is None


def test_only_processors_behind_which_none_needs_all_tokens_narrow() -> None:
    warm, best, nucleus, least = (
        TemperatureLogitsWarper(0.5),
        TopKLogitsWarper(5),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.1),
    )
    penalty, typical = RepetitionPenaltyLogitsProcessor(1.2), TypicalLogitsWarper(0.9)
    assert first_that_narrows([warm, best, nucleus, least]) == 1
    assert first_that_narrows([penalty, warm, nucleus]) == 2
    assert first_that_narrows([best, typical, nucleus]) == 2
    assert first_that_narrows([warm, best, typical]) is None
    assert first_that_narrows([warm, least]) is None
    assert first_that_narrows([]) is None


CASES: dict[str, dict[str, Any]] = {
    "top_k": {"temperature": 0.7, "top_k": 50},
    "top_k and top_p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "all four": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    "top_p": {"temperature": 0.8, "top_k": 0, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "top_k": 0, "min_p": 0.1},
    "none": {"temperature": 1.0, "top_k": 0},
}


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A model with a vocabulary of V tokens, as far as a sampler asks one; `own`: transformers' processors of an
    option."""

    def own(options: SamplingOptions) -> LogitsProcessorList:
        made: list[Any] = []
        if options.repetition_penalty:
            made.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
        made.append(TemperatureLogitsWarper(options.temperature))
        made += [TopKLogitsWarper(options.top_k)] if options.top_k else []
        made += [TopPLogitsWarper(options.top_p)] if options.top_p else []
        made += [MinPLogitsWarper(options.min_p)] if options.min_p else []
        return LogitsProcessorList(made)

    return SimpleNamespace(own=own)


@pytest.mark.parametrize("logarithms", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_that_torch_draws_of_all(
    case: str, logarithms: bool, processors: SimpleNamespace, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SamplingOptions(**CASES[case], seed=9, max_new_tokens=1000)
    own = processors.own(options)
    monkeypatch.setattr(sampling, "_processors", lambda *given, **more: own)
    if not logarithms:
        monkeypatch.setattr(draws, "_logarithms_are_exponentials", lambda: False)
    sampler = Sampler(tiny_model, options, PROMPT)
    ids, random = torch.tensor([PROMPT]), torch.Generator().manual_seed(9)
    for step in range(60):
        ties = "peaked" if options.top_p else "ties"  # which of equal ones top_p keeps is the choice of torch's sort
        logits = logits_of(["peaked", ties, "few", "even"][step % 4], step)
        chances = torch.softmax(own(ids, logits[None].clone()), dim=-1)
        expected = torch.multinomial(chances, 1, generator=random)
        assert sampler.next(logits) == int(expected), f"step {step}"
        ids = torch.cat([ids, expected], dim=-1)


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("none", "min_p")])
def test_nothing_is_sorted_that_has_no_chance(
    case: str, processors: SimpleNamespace, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SamplingOptions(**CASES[case], seed=9, max_new_tokens=1000)
    monkeypatch.setattr(sampling, "_processors", lambda *given, **more: processors.own(options))
    sampler = Sampler(tiny_model, options, PROMPT)
    sizes: list[int] = []

    def counted(name: str) -> Any:
        own = getattr(torch, name)

        def run(given: torch.Tensor, *args: Any, **more: Any) -> Any:
            sizes.append(given.shape[-1])
            return own(given, *args, **more)

        return run

    for name in ("sort", "topk"):
        monkeypatch.setattr(torch, name, counted(name))
    sampler.next(logits_of("peaked", 3))
    assert max(sizes, default=0) <= 50


def test_logarithms_stand_for_draws_only_where_they_are_the_same() -> None:
    scores = torch.randn(1, 500, generator=torch.Generator().manual_seed(1))
    by_logarithms, by_torch = Draws(3), torch.Generator().manual_seed(3)
    for _ in range(20):
        expected = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=by_torch)
        assert int(by_logarithms.choose(scores)) == int(expected)
