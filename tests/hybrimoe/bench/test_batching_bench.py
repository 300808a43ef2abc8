"""`hybrimoe bench batching` on a small synthetic trace."""

import pytest

from hybrimoe.bench.batching import BatchingRequest, compare
from hybrimoe.errors import ConfigError
from scheduler.errors import PolicyError


def request(**changes):
    values = {
        "trace": None, "hardware": "laptop", "model_shape": None, "policy": "static", "cache_ratio": 0.25,
        "batch_size": 4, "prompt_tokens": 8, "new_tokens": 12, "sequences": 8, "seed": 0,
    }  # fmt: skip
    return BatchingRequest(**(values | changes))


def test_every_grouping_does_the_same_work_with_other_experts():
    report = compare(request())
    rows = {row.grouping: row for row in report.rows}
    assert list(rows) == ["one by one", "none", "expertflow", "replies known", "moe-lightning"]
    assert rows["one by one"].counted_distinct == rows["one by one"].expected_distinct == 4.0, "top-4 of one token"
    assert (rows["none"].batch, rows["none"].batches) == (4, 3)
    assert rows["replies known"].expected_distinct <= rows["none"].expected_distinct
    assert rows["one by one"].counted_distinct < rows["none"].counted_distinct < 16.0
    assert rows["none"].decode_tokens_per_s > rows["one by one"].decode_tokens_per_s
    assert rows["moe-lightning"].batch == report.plan.batch
    assert report.as_dict()["kind"] == "simulated"
    assert report == compare(request()), "the same seed, the same numbers"


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="lower --prompt-tokens"):
        compare(request(new_tokens=5000))
    with pytest.raises(PolicyError, match="static"):
        compare(request(policy="statik"))
