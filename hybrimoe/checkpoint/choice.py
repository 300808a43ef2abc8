"""The dtype that experts are packed as where nobody says one: what suits the way in which their file has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cpu_kernels import DTYPES, ExpertDtype
from hybrimoe.checkpoint.experts import LayerSource
from hybrimoe.checkpoint.stored import Storage

FLOAT_DTYPE: ExpertDtype = "bfloat16"
"""For experts that are not quantised: exact for most checkpoints, whose weights are bfloat16."""
CODES: tuple[ExpertDtype, ...] = ("int2", "int3", "int4", "int5", "int6", "int8")
"""What a quantised file may suit (a packed one also floats). Codes of fewer bits stay in records for more of them, but
for int8, which rounds."""


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """The dtype of experts and, where their file has them quantised, in a sentence what that means."""

    dtype: ExpertDtype
    remark: str | None = None


def choose_expert_dtype(wanted: ExpertDtype | None, sources: Iterable[LayerSource]) -> ExpertChoice:
    """The dtype for the experts of `sources`. wanted: what somebody says; None to follow the file.

    Of experts that are quantised in several ways it is one that suits all: of several numbers of bits, whose codes stay
    in records for more of them, that for most; else, or where some experts are not quantised, int8.
    """
    found = {storage for source in sources for storage in source.storages()}
    quantised = sorted((storage for storage in found if storage.suits is not None), key=lambda storage: storage.name)
    if not quantised:
        return ExpertChoice(wanted or FLOAT_DTYPE)
    followed = _one_for_all(storage.suits for storage in quantised) if len(found) == len(quantised) else "int8"
    names = "; ".join(storage.name for storage in quantised)
    if wanted is not None and wanted != followed:
        return ExpertChoice(
            wanted, f"the file has its experts as {names}; they are packed as {wanted}: {_measure(followed)}"
        )
    return ExpertChoice(
        followed, f"experts are {followed}, as suits the file ({names}): {_change(followed, quantised)}"
    )


def _one_for_all(suited: Iterable[ExpertDtype | None]) -> ExpertDtype:
    """The dtype in which what suits one of these loses least: itself, of codes that for most bits, else int8."""
    dtypes = {dtype for dtype in suited if dtype is not None}
    if len(dtypes) == 1:
        return dtypes.pop()
    return max(dtypes, key=CODES.index) if dtypes.issubset(CODES) else "int8"


def _keeps(storage: Storage, dtype: ExpertDtype) -> bool:
    """Whether experts that are stored so are not rounded again as `dtype`."""
    if storage.suits == dtype:
        return True
    narrow = CODES[: CODES.index(dtype)] if dtype in CODES[:-1] else ()
    return storage.suits in narrow


def _change(followed: ExpertDtype, quantised: Iterable[Storage]) -> str:
    changes = {storage.remark if _keeps(storage, followed) else "rounded again" for storage in quantised}
    text = "; ".join(sorted(changes))
    if "rounded again" not in changes:
        return text
    return f"{text}, by less than int4 would (--dtype int4 takes half the memory)"


def _measure(followed: ExpertDtype) -> str:
    return f"{followed} suits it; `hybrimoe inspect` measures what each dtype adds"


def wanted_dtype(expert_dtype: str) -> ExpertDtype | None:
    """What a deployment's `cpu.expert_dtype` asks for; None for "auto"."""
    return next((dtype for dtype in DTYPES if dtype == expert_dtype), None)
