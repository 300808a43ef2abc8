"""torch, transformers and what runs a model, imported as fast as they can be: most of the start of a packed model."""

from __future__ import annotations

import gc
import importlib
import sys

from hybrimoe.compat import import_masks_alone, leave_dynamo_out, without_what_is_not_needed

MODELING = "transformers.modeling_utils"
RUNS_MODELS = (
    "hybrimoe.checkpoint.loading", "hybrimoe.injection.inject", "hybrimoe.step.build", "hybrimoe.generation.engine",
)  # fmt: skip

SELDOM = 20_000
"""New objects between two looks of Python's collector of cycles while a program starts; Python's own 700 (2,000 from
3.13 on) have it look at every module thousands of times."""
OFTEN = gc.get_threshold()[0]


def collect_seldom() -> None:
    """Until `import_libraries` has ended, or the program, Python's collector of cycles looks as seldom as `SELDOM`. For
    programs of ours: the process is theirs."""
    gc.set_threshold(SELDOM, *gc.get_threshold()[1:])


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
        leave_dynamo_out()
        import_masks_alone()
        if MODELING not in sys.modules:
            with without_what_is_not_needed():
                importlib.import_module(MODELING)
        for name in names:
            importlib.import_module(name)
        gc.freeze()
    finally:
        gc.set_threshold(OFTEN, *gc.get_threshold()[1:])
        if collects:
            gc.enable()
