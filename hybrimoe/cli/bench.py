"""`hybrimoe bench`: collects the benchmarks of `hybrimoe.bench` (see its docstring for the convention)."""

from __future__ import annotations

import importlib
import pkgutil

import typer

import hybrimoe.bench


def register(app: typer.Typer) -> None:
    """Add `bench` with one sub-command for each module of `hybrimoe.bench`."""
    bench_app = typer.Typer(no_args_is_help=True, help="Measure kernels, decoding, prefill, and policies side by side.")

    @bench_app.callback()
    def group() -> None:
        """Measure kernels, decoding, prefill, and policies side by side."""

    for found in pkgutil.iter_modules(hybrimoe.bench.__path__):
        if not found.name.startswith("_"):
            importlib.import_module(f"hybrimoe.bench.{found.name}").register(bench_app)
    app.add_typer(bench_app, name="bench")
