"""Balanced k-means against hand-made clusters and against every balanced partition."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.batching import balanced_kmeans
from scheduler.errors import SchedulerError


def sum_of_squares(points, clusters):
    return sum(((points[clusters == g] - points[clusters == g].mean(axis=0)) ** 2).sum() for g in set(clusters))


def test_two_heaps_are_found_whatever_the_order():
    points = np.array([[0.0], [10.0], [0.2], [10.2], [0.1], [10.1]])
    assert balanced_kmeans(points, 2, np.random.default_rng(0)).tolist() == [0, 1, 0, 1, 0, 1]


def test_sizes_are_equal_where_heaps_are_not():
    """Plain k-means would make 4 + 2. The balanced optimum moves the point that is nearest to the other heap."""
    points = np.array([[0.0], [0.1], [0.2], [1.0], [5.0], [5.1]])
    assert balanced_kmeans(points, 2, np.random.default_rng(0)).tolist() == [0, 0, 0, 1, 1, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data())
def test_every_point_has_a_cluster_and_sizes_differ_by_at_most_one(n_points, data):
    n_clusters = data.draw(st.integers(1, n_points))
    seed = data.draw(st.integers(0, 2**16))
    points = np.random.default_rng(seed).random((n_points, 3)).round(1)  # with equal points
    first = balanced_kmeans(points, n_clusters, np.random.default_rng(seed))
    again = balanced_kmeans(points, n_clusters, np.random.default_rng(seed))
    assert first.tolist() == again.tolist()
    sizes = np.bincount(first, minlength=n_clusters)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1
    assert list(dict.fromkeys(first.tolist())) == list(range(n_clusters)), "numbered by first point"


def test_near_the_best_balanced_partition():
    rng = np.random.default_rng(3)
    for _ in range(10):
        points = rng.random((8, 2))
        best = min(
            sum_of_squares(points, np.isin(np.arange(8), half).astype(int))
            for half in itertools.combinations(range(8), 4)
        )
        found = sum_of_squares(points, balanced_kmeans(points, 2, np.random.default_rng(0)))
        assert found <= 1.15 * best


@pytest.mark.parametrize(
    ("points", "n_clusters", "words"),
    [
        (np.zeros((0, 2)), 1, "at least 1"),
        (np.zeros((3, 2)), 4, "expected 1 to 3"),
        (np.zeros((3, 2)), 0, "expected 1 to 3"),
        (np.array([[np.nan]]), 1, "NaN"),
    ],
)
def test_bad_input_is_refused(points, n_clusters, words):
    with pytest.raises(SchedulerError, match=words):
        balanced_kmeans(points, n_clusters, np.random.default_rng(0))
