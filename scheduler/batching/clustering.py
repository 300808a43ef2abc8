"""Balanced k-means: clusters of equal size, deterministic for a seed.

ExpertFlow's token scheduler (arXiv 2410.17954) puts sequences with like routing paths into one batch by k-means over
their route vectors, with clusters of equal size because batches are. Lloyd's two steps, with a balanced assignment:

1. assignment to fixed centroids c: minimise sum_i ||x_i - c_{a(i)}||^2 with sizes that differ by at most one. First
   greedily (the point that would lose most by its second choice goes first), then pairs are exchanged while the best
   exchange lowers the sum;
2. c_g = mean of the points in g.

Until the assignment stays, for a few random starts (k-means++); the start with the least sum wins, ties the earliest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scheduler.errors import SchedulerError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STARTS = 4
"""Random starts; the best is kept."""
MAX_ROUNDS = 50
"""Lloyd rounds of one start; it ends earlier when no point moves."""
LEAST_GAIN = 1e-12
"""An exchange must lower the sum of squares by more than this share of it: rounding must not make it run for ever."""


def balanced_kmeans(points: Floats, n_clusters: int, rng: np.random.Generator) -> Ints:
    """Cluster of each of the points float64 [n, d], int64 [n], in 0..n_clusters - 1.

    Sizes are ceil(n / n_clusters) or floor(n / n_clusters). Clusters are numbered by their first point. Raises
    SchedulerError for no points, a number of clusters outside 1..n, and values that are not finite.
    """
    points = np.ascontiguousarray(points, dtype=np.float64)
    if points.ndim != 2 or not len(points):
        raise SchedulerError(f"expected points [n, d] with n of at least 1, found shape {list(points.shape)}")
    if not 1 <= n_clusters <= len(points):
        raise SchedulerError(f"{n_clusters} clusters of {len(points)} points: expected 1 to {len(points)}")
    if not np.isfinite(points).all():
        raise SchedulerError("points to be clustered hold NaN or infinite values")
    best, least = np.zeros(len(points), np.int64), np.inf
    for _ in range(STARTS):
        found, total = _one_start(points, n_clusters, rng)
        if total < least * (1.0 - LEAST_GAIN):
            best, least = found, total
    return by_first_point(best)


def by_first_point(assignment: Ints) -> Ints:
    """The same clusters, numbered in the order of their first points."""
    _, first, inverse = np.unique(assignment, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first, kind="stable"), kind="stable")
    return np.asarray(rank[inverse], np.int64)


def _one_start(points: Floats, n_clusters: int, rng: np.random.Generator) -> tuple[Ints, float]:
    centroids = _plus_plus(points, n_clusters, rng)
    assignment = np.full(len(points), -1, np.int64)
    for _ in range(MAX_ROUNDS):
        distances = _squared_distances(points, centroids)
        found = _exchange(distances, _greedy(distances))
        if np.array_equal(found, assignment):
            break
        assignment = found
        centroids = np.stack([points[assignment == g].mean(axis=0) for g in range(n_clusters)])
    total = _squared_distances(points, centroids)[np.arange(len(points)), assignment].sum()
    return assignment, float(total)


def _plus_plus(points: Floats, n_clusters: int, rng: np.random.Generator) -> Floats:
    """k-means++: each further centroid is a point drawn with probability ~ squared distance to the nearest one."""
    chosen = [int(rng.integers(len(points)))]
    nearest = _squared_distances(points, points[chosen])[:, 0]
    while len(chosen) < n_clusters:
        total = nearest.sum()
        free = np.setdiff1d(np.arange(len(points)), chosen)
        at = int(rng.choice(len(points), p=nearest / total)) if total > 0.0 else int(free[0])
        chosen.append(at)
        nearest = np.minimum(nearest, _squared_distances(points, points[[at]])[:, 0])
    return points[chosen]


def _squared_distances(points: Floats, centroids: Floats) -> Floats:
    """[n, k]."""
    cross = points @ centroids.T
    lengths = (points * points).sum(axis=1)[:, None] + (centroids * centroids).sum(axis=1)[None, :]
    return np.asarray(np.maximum(lengths - 2.0 * cross, 0.0), np.float64)


def _greedy(distances: Floats) -> Ints:
    """Each point to its nearest cluster with room; who loses most by not getting its first choice goes first."""
    n_points, n_clusters = distances.shape
    room = np.full(n_clusters, n_points // n_clusters)
    large = n_points % n_clusters  # so many clusters may hold one point more
    ranked = np.sort(distances, axis=1)
    regret = ranked[:, min(1, n_clusters - 1)] - ranked[:, 0]
    preference = np.argsort(distances, axis=1, kind="stable")
    assignment = np.empty(n_points, np.int64)
    for point in np.argsort(-regret, kind="stable").tolist():
        for cluster in preference[point].tolist():
            if room[cluster] > 0 or (room[cluster] == 0 and large > 0):
                large -= room[cluster] == 0
                room[cluster] -= 1
                assignment[point] = cluster
                break
    return assignment


def _exchange(distances: Floats, assignment: Ints) -> Ints:
    """Exchanges the pair of points that lowers the sum most, until no pair does (ties: the smallest positions)."""
    assignment = assignment.copy()
    everyone = np.arange(len(assignment))
    floor = LEAST_GAIN * max(float(distances.sum()), 1.0)
    while True:
        own = distances[everyone, assignment]
        # gains[i, j]: what i saves by moving to j's cluster; an exchange saves both.
        gains = own[:, None] - distances[:, assignment]
        gains += gains.T.copy()
        at = int(np.argmax(gains))
        first, second = divmod(at, len(assignment))
        if gains[first, second] <= floor:
            return assignment
        assignment[[first, second]] = assignment[[second, first]]
