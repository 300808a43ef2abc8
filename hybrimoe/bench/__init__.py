"""`hybrimoe bench <name>`: one module a benchmark.

A benchmark is a module `hybrimoe/bench/<name>.py` with

    def register(app: typer.Typer) -> None:
        app.command("<name>", help="...")(function)

`hybrimoe bench` lists and loads every module of this package which is not private (`_...`), so a new file is all that
a new benchmark needs. Keep torch, transformers and numba imports inside functions: the help lists all benchmarks.
Every benchmark has `--json`, prints medians with their spread over alternating rounds, says on which machine, and
says measured, emulated or simulated. `benchmarks/<name>.py` is the runner script beside it.
"""
