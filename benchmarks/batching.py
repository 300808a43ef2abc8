"""Groupings of batched prompts as a script: the same as ``hybrimoe bench batching``.

    python benchmarks/batching.py --trace demo --batch-size 4

Simulated, not measured: the planner of the runtime over a trace and a hardware profile.
"""

from __future__ import annotations

import typer

from hybrimoe.bench.batching import batching

if __name__ == "__main__":
    typer.run(batching)
