"""Fit the locality of ``scheduler.traces.synthetic`` to a real trace.

    python benchmarks/fit_locality.py trace.npz [--tokens 1000]

Differential evolution (scipy, seed 0) on the squared differences of ``scheduler.traces.synthetic.statistics``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from scipy.optimize import differential_evolution

from scheduler.traces.synthetic import Locality, generate, statistics
from scheduler.traces.trace import Trace

#: popularity, topic, memory, token
BOUNDS = [(0.0, 3.0), (0.0, 5.0), (0.5, 0.999), (0.0, 5.0)]


def main() -> None:
    """Print the fitted parameters and both sets of statistics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=12)
    arguments = parser.parse_args()
    trace = Trace.load(arguments.trace)
    n_layers = min(trace.n_layers, 8)
    real = replace(
        trace.head(arguments.tokens),
        expert_ids=trace.expert_ids[: arguments.tokens, :n_layers],
        expert_weights=None,
        predicted_ids=None,
        meta={**trace.meta, "num_layers": n_layers},
    )
    target = np.array(list(statistics(real).as_dict().values()))
    spans = real.sequence_spans()
    length = int(np.median([stop - start for start, stop in spans]))

    def synthetic(values: np.ndarray) -> np.ndarray:
        made = generate(
            n_layers,
            real.n_experts,
            real.top_k,
            length,
            max(1, real.n_tokens // length),
            locality=Locality(*values),
            recall=None,
        )
        return np.array(list(statistics(made).as_dict().values()))

    result = differential_evolution(
        lambda values: float(((synthetic(values) - target) ** 2).sum()),
        BOUNDS, seed=0, maxiter=arguments.iterations, popsize=8, polish=False,
    )  # fmt: skip
    print("fitted  ", Locality(*(round(float(v), 3) for v in result.x)), "squared error", f"{result.fun:.5f}")
    print("real    ", np.round(target, 3))
    print("synthetic", np.round(synthetic(result.x), 3))


if __name__ == "__main__":
    main()
