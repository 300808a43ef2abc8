"""Routing from hidden states: what a linear map says is found, gates are corrected, and what is missing is named."""

from dataclasses import replace

import numpy as np
import pytest

from scheduler.traces.hidden import HiddenPredictor
from scheduler.traces.predictions import Predictions, predictions_for, recorded
from scheduler.traces.trace import Trace, TraceError

LAYERS, EXPERTS, TOP_K, WIDTH, TOKENS = 4, 8, 2, 6, 400


def best(scores: np.ndarray, n: int) -> np.ndarray:
    return np.argsort(-scores, axis=-1, kind="stable")[..., :n].astype(np.int16)


def routed(seed: int = 0) -> Trace:
    """A router of each layer is a matrix on a state that turns a little from layer to layer; the gates' predictions
    name the expert above the right one."""
    random = np.random.default_rng(0)
    gates = random.standard_normal((LAYERS, WIDTH, EXPERTS))
    turn = np.linalg.qr(np.eye(WIDTH) + 0.6 * random.standard_normal((WIDTH, WIDTH)))[0]
    state = np.random.default_rng(seed).standard_normal((TOKENS, WIDTH))
    states = [state]
    for _ in range(LAYERS - 1):
        states.append(states[-1] @ turn)
    hidden = np.stack(states, axis=1)
    ids = best(np.einsum("tlh,lhe->tle", hidden, gates), TOP_K)
    wrong = np.full((TOKENS, LAYERS, 3, TOP_K), -1, np.int16)
    for ahead in (1, 2, 3):
        wrong[:, : LAYERS - ahead, ahead - 1] = (ids[:, ahead:] + 1) % EXPERTS
    return Trace(
        expert_ids=ids,
        sequence=np.repeat([0, 1], TOKENS // 2).astype(np.int32),
        phase=np.ones(TOKENS, np.uint8),
        meta={"model": "toy", "num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K},
        predicted_ids=wrong,
        hidden=hidden.astype(np.float16),
    )


def recall(trace: Trace, found: Predictions, ahead: int) -> float:
    truth = trace.expert_ids[:, ahead:]
    told = found.ids[:, : LAYERS - ahead, ahead - 1]
    return float((truth[..., :, None] == told[..., None, :]).any(-1).mean())


def test_states_tell_the_routing_of_later_layers_on_other_tokens() -> None:
    learned_on, others = routed(seed=1), routed(seed=2)
    found = predictions_for(others, "hidden", learned_on)
    assert found is not None
    assert (found.kind, found.horizon) == ("hidden", 3)
    assert all(recall(others, found, ahead) > 0.75 for ahead in (1, 2, 3)), "by chance 0.25"
    assert (found.ids[:, -1] == -1).all()
    assert 0.0 <= found.scores.min() <= found.scores.max() <= 1.0
    again = predictions_for(others, "hidden", learned_on)
    assert again is not None
    np.testing.assert_array_equal(found.ids, again.ids)


def test_the_rest_corrects_the_gates() -> None:
    """The recorded gates always name the neighbour: together with the state that says more than either alone."""
    learned_on, others = routed(seed=1), routed(seed=2)
    by_gates, by_state, both = (
        predictions_for(others, kind, learned_on) for kind in ("recorded", "hidden", "residual")
    )
    assert by_gates is not None
    assert by_state is not None
    assert both is not None
    assert recall(others, by_gates, 1) < 0.3
    assert recall(others, both, 1) > max(recall(others, by_state, 1), 0.98)


def test_nothing_of_the_predicted_trace_is_learned_from() -> None:
    learned_on, others = routed(seed=1), routed(seed=2)
    shuffled = replace(others, expert_ids=others.expert_ids[::-1].copy())
    model = HiddenPredictor().fit(learned_on)
    np.testing.assert_array_equal(model.predict(others)[0], model.predict(shuffled)[0])


@pytest.mark.parametrize(
    ("kind", "missing", "message"),
    [
        (
            "hidden",
            {"hidden": None},
            "no hidden states to predict from; record it with `hybrimoe trace record --hidden",
        ),
        ("residual", {"predicted_ids": None}, "no predicted_ids to correct"),
    ],
)
def test_what_a_trace_lacks_is_named(kind: str, missing: dict, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        predictions_for(replace(routed(), **missing), kind)


def test_traces_of_other_widths_are_refused() -> None:
    learned_on = routed()
    assert learned_on.hidden is not None
    narrow = replace(learned_on, hidden=learned_on.hidden[..., :4])
    with pytest.raises(TraceError, match="recorded with the same --hidden"):
        HiddenPredictor().fit(learned_on).predict(narrow)
    assert recorded(narrow).horizon == 3
