"""Lossy policy ``defer`` by hand: which experts of a token come one layer later."""

import numpy as np
import pytest

from scheduler.errors import PolicyError
from scheduler.lossy import DEFERRED, FULL, LossySetting, Routing, resolve_lossy


def rewrite(ids, weights, resident=(), layer=0, phase="decode", **params):
    policy = resolve_lossy({"kind": "defer", **params}).make(LossySetting(3, 8))
    mask = np.isin(np.arange(8), resident)
    return policy.rewrite(Routing(layer, phase, np.array(ids, np.int32), np.array(weights, np.float32), mask))


def test_the_two_lightest_that_are_not_resident_are_late():
    """By weight: 5 (.4), 1 (.3), 7 (.2), 2 (.1): 7 and 2 are late; with 2 resident only 7, and never 5 and 1."""
    ids, weights = [[1, 2, 5, 7]], [[0.3, 0.1, 0.4, 0.2]]
    assert rewrite(ids, weights).parts.tolist() == [[FULL, DEFERRED, FULL, DEFERRED]]
    assert rewrite(ids, weights, resident=[2]).parts.tolist() == [[FULL, FULL, FULL, DEFERRED]]
    assert rewrite(ids, weights, experts=1).parts.tolist() == [[FULL, DEFERRED, FULL, FULL]]
    assert rewrite(ids, weights, experts=4, immediate=0).parts.tolist() == [[DEFERRED] * 4]
    assert rewrite(ids, weights, resident=[2, 7]).parts is None


def test_routing_and_weights_stay():
    found = rewrite([[1, 2, 5, 7]], [[0.3, 0.1, 0.4, 0.2]])
    assert found.expert_ids.tolist() == [[1, 2, 5, 7]]
    assert found.skipped == found.substituted == found.lowered == 0


def test_an_expert_that_another_token_needs_now_is_not_late():
    ids, weights = [[0, 1, 2], [2, 3, 4]], [[0.5, 0.3, 0.2]] * 2
    assert rewrite(ids, weights).parts.tolist() == [[FULL, FULL, FULL], [FULL, FULL, DEFERRED]]


def test_absent_experts_are_never_late_and_do_not_count():
    found = rewrite([[3, -1, 4, 5]], [[0.5, 0.0, 0.3, 0.2]], experts=1)
    assert found.parts.tolist() == [[FULL, FULL, FULL, DEFERRED]]


@pytest.mark.parametrize("where", [{"phase": "prefill"}, {"layer": 2}])
def test_prompts_and_the_last_layer_defer_nothing(where):
    assert rewrite([[1, 2, 5, 7]], [[0.3, 0.1, 0.4, 0.2]], **where).parts is None


@pytest.mark.parametrize("bad", [{"experts": 0}, {"immediate": -1}, {"experts": 1.5}, {"expert": 1}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PolicyError, match="defer"):
        resolve_lossy({"kind": "defer", **bad})
