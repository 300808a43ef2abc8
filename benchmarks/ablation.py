"""The ablation as a script: the same as ``hybrimoe bench ablation``.

    python benchmarks/ablation.py --quick --out /tmp/ablation

Simulated, not measured: the planner of the runtime over traces and hardware profiles.
"""

from __future__ import annotations

import typer

from hybrimoe.bench.ablation import ablation

if __name__ == "__main__":
    typer.run(ablation)
