"""Lossy policy ``d2moe`` by hand: which experts of a call need all their bits."""

import numpy as np
import pytest

from scheduler.errors import PolicyError
from scheduler.lossy import LossySetting, Routing, resolve_lossy


def whole(ids, weights, **params):
    policy = resolve_lossy({"kind": "d2moe", **params}).make(LossySetting(2, 6))
    routing = Routing(0, "decode", np.array(ids, np.int32), np.array(weights, np.float32), np.zeros(6, np.bool_))
    rewritten = policy.rewrite(routing)
    assert rewritten.expert_ids.tolist() == ids
    assert rewritten.parts is None
    return np.flatnonzero(rewritten.whole).tolist()


def test_experts_with_an_even_share_or_more_of_a_token_need_all_bits():
    assert whole([[1, 4, 2]], [[0.6, 0.3, 0.1]]) == [1], "an even share of three is a third"
    assert whole([[1, 4, 2]], [[6.0, 3.0, 1.0]]) == [1], "shares, whatever the weights add up to"
    assert whole([[1, 4, 2]], [[0.6, 0.3, 0.1]], full_share=0.25) == [1, 4]
    assert whole([[1, 4, 2]], [[0.6, 0.3, 0.1]], full_share=1.0) == []
    assert whole([[1, 4, 2]], [[0.6, 0.3, 0.1]], full_share=0.0) == [1, 2, 4]


def test_one_token_is_enough_and_absent_experts_do_not_count():
    assert whole([[1, 4], [4, -1]], [[0.9, 0.1], [0.5, 0.0]]) == [1, 4]
    assert whole([[-1, -1]], [[0.0, 0.0]], full_share=0.0) == []


@pytest.mark.parametrize("bad", [{"full_share": 1.5}, {"full_share": "a"}, {"share": 0.5}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PolicyError, match="d2moe"):
        resolve_lossy({"kind": "d2moe", **bad})
