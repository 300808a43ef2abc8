"""Synthetic traces: reproducible, valid, and as local as the real traces that they were fitted to."""

from dataclasses import replace

import numpy as np
import pytest

from scheduler.errors import SchedulerError
from scheduler.traces.analysis_cache import layer_hit_rate
from scheduler.traces.synthetic import FITTED_TO, PUBLISHED_HITS, Locality, generate, statistics
from scheduler.traces.trace import Trace

SIZES = {"gpt-oss-20b": (8, 32, 4, 511, 2), "olmoe-1b-7b": (8, 64, 8, 299, 1)}
#: Per statistic; the fit itself is within 0.03.
TOLERANCE = 0.06


@pytest.mark.parametrize("name", sorted(FITTED_TO))
def test_statistics_match_the_fitted_trace(name):
    trace = generate(*SIZES[name], locality=name, recall=None)
    assert list(statistics(trace).as_dict().values()) == pytest.approx(FITTED_TO[name], abs=TOLERANCE)


@pytest.mark.parametrize("name", sorted(FITTED_TO))
def test_the_stated_statistics_are_those_of_the_real_trace(real_traces, name):
    trace = Trace.load(real_traces / f"{name}.decode.npz").head(1000)
    real = replace(trace, expert_ids=trace.expert_ids[:, :8], expert_weights=None, meta={**trace.meta, "num_layers": 8})
    assert list(statistics(real).as_dict().values()) == pytest.approx(FITTED_TO[name], abs=0.001)


@pytest.mark.parametrize(("name", "n_experts", "top_k"), [("qwen2-57b-a14b", 64, 8), ("deepseek-v2-lite", 64, 6)])
def test_localities_of_published_hit_rates(name, n_experts, top_k):
    trace = generate(8, n_experts, top_k, 256, 4, locality=name, recall=None)
    found = [layer_hit_rate(trace, "lru", n_experts // 4), layer_hit_rate(trace, "mrs", n_experts // 4, 0.1)]
    assert found == pytest.approx(PUBLISHED_HITS[name], abs=0.02)
    mixtral = generate(8, 8, 2, 256, 4, locality="mixtral-8x7b", recall=None)
    assert layer_hit_rate(mixtral, "lru", 2) == pytest.approx(PUBLISHED_HITS["mixtral-8x7b"][0], abs=0.02)


def test_equal_arguments_give_equal_traces():
    first, second = (generate(2, 8, 2, 30, 2, n_prefill=10, seed=4) for _ in range(2))
    np.testing.assert_array_equal(first.expert_ids, second.expert_ids)
    np.testing.assert_array_equal(first.predicted_ids, second.predicted_ids)
    assert not np.array_equal(first.expert_ids, generate(2, 8, 2, 30, 2, n_prefill=10, seed=5).expert_ids)
    assert [s.n_tokens for s in first.steps("prefill")] == [10, 10]
    assert first.expert_weights.astype(float).sum(-1) == pytest.approx(1.0, abs=0.01)


def test_each_strength_does_what_it_says():
    def measured(**changed):
        values = {"popularity": 0.0, "topic": 0.0, "memory": 0.9, "token": 0.0, **changed}
        return statistics(generate(4, 16, 2, 400, locality=Locality(**values), recall=None))

    flat = measured()
    assert flat.overlap == pytest.approx(2 / 16, abs=0.03)
    assert measured(popularity=3.0).entropy < flat.entropy - 0.1
    assert measured(topic=5.0).overlap > flat.overlap + 0.2
    assert measured(token=5.0).overlap < measured(topic=5.0).overlap - 0.2
    assert measured(token=5.0).next_layer_recall > flat.next_layer_recall + 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 9}, "top-9"),
        ({"n_prefill": 31}, "prefill must have 0..30"),
        ({"locality": "gpt-os"}, "did you mean 'gpt-oss-20b'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(SchedulerError, match=message):
        generate(**{"n_layers": 2, "n_experts": 8, "top_k": 2, "n_tokens": 30, **arguments})
    with pytest.raises(SchedulerError, match="memory"):
        Locality(1.0, 1.0, 1.0, 1.0)
