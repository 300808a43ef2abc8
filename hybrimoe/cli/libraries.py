"""torch, transformers and what runs a model, imported as fast as they can be: most of the start of a packed model."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MODELING = "transformers.modeling_utils"
RUNS_MODELS = (
    "hybrimoe.checkpoint.loading", "hybrimoe.injection.inject", "hybrimoe.step.build", "hybrimoe.generation.engine",
)  # fmt: skip
NOT_NEEDED = ("is_torch_distributed_available", "is_scipy_available")
"""What transformers' base of all models would import 1,000 modules for: models over several processes, and the losses
of object detection. It runs without either, as where they are not installed."""


def import_libraries(*more: str) -> None:
    """Import what a command needs that runs a model, and further modules. For programs of ours: the process is theirs.

    Python's collector of cycles rests meanwhile: it would look through everything again and again and find nothing.
    Afterwards it leaves out what there is, so that no token waits for it.
    """
    names = [name for name in (*RUNS_MODELS, *more) if name not in sys.modules]
    if not names:
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        if MODELING not in sys.modules:
            with _without_what_is_not_needed():
                importlib.import_module(MODELING)
        for name in names:
            importlib.import_module(name)
        gc.freeze()
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def _without_what_is_not_needed() -> Iterator[None]:
    """Within the block transformers imports neither `NOT_NEEDED` nor reads its 2,000 files for names a second time."""
    import transformers
    from transformers.utils import import_utils

    define = import_utils.define_import_structure
    changes = [(home, name, lambda: False) for name in NOT_NEEDED for home in (import_utils, transformers.utils)]
    changes.append((import_utils, define.__name__, names_by_module(define)))
    before = [(home, name, getattr(home, name)) for home, name, _ in changes]
    try:
        for home, name, value in changes:
            setattr(home, name, value)
        yield
    finally:
        for home, name, value in before:
            setattr(home, name, value)


def names_by_module(define: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' own `define`, which remembers what it has read, for its package of models: read as a part of
    transformers already, and now asked for as a package by itself."""
    import transformers

    models = Path(transformers.__file__).parent / "models"

    def defined(path: Any, prefix: str | None = None) -> Any:
        if prefix is not None or Path(path) != models / "__init__.py":
            return define(path, prefix)
        known = define(models, prefix=models.name)
        return {
            backends: {name.partition(".")[2]: names for name, names in of.items() if name.startswith("models.")}
            for backends, of in known.items()
        }

    return defined
