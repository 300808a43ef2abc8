"""`hybrimoe bench <name>`: one module a benchmark.

A benchmark is a module `hybrimoe/cli/bench/<name>.py` with

    def register(app: typer.Typer) -> None:
        app.command("<name>", help="...")(function)

Every module of this package but those in `SHARED` is listed and loaded, so a new file is all that a new benchmark
needs. Keep torch, transformers and numba imports inside functions: the help lists all benchmarks. What is measured
lives in `hybrimoe.bench`.
"""

from __future__ import annotations

import importlib
import pkgutil

import typer

SHARED = ("model_run", "options")
"""Modules of parts that several benchmarks share; no benchmarks themselves."""


def register(app: typer.Typer) -> None:
    """Add `bench` with one sub-command for each module of this package."""
    bench_app = typer.Typer(no_args_is_help=True, help="Measure kernels, decoding, prefill, and policies side by side.")

    @bench_app.callback()
    def group() -> None:
        """Measure kernels, decoding, prefill, and policies side by side."""

    for found in pkgutil.iter_modules(__path__):
        if found.name not in SHARED:
            importlib.import_module(f"{__name__}.{found.name}").register(bench_app)
    app.add_typer(bench_app, name="bench")
