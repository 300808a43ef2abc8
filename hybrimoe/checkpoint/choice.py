"""The dtype that experts are packed as where nobody says one: what suits the way in which their file has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cpu_kernels import DTYPES, ExpertDtype
from hybrimoe.checkpoint.experts import LayerSource
from hybrimoe.checkpoint.stored import Storage

FLOAT_DTYPE: ExpertDtype = "bfloat16"
"""For experts that are not quantised: exact for most checkpoints, whose weights are bfloat16."""


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """The dtype of experts and, where their file has them quantised, in a sentence what that means."""

    dtype: ExpertDtype
    remark: str | None = None


def choose_expert_dtype(wanted: ExpertDtype | None, sources: Iterable[LayerSource]) -> ExpertChoice:
    """The dtype for the experts of `sources`. wanted: what somebody says; None to follow the file.

    Of experts that are quantised in several ways, or of which some are not, it is one that suits all, and at most int8.
    """
    found = {storage for source in sources for storage in source.storages()}
    quantised = sorted((storage for storage in found if storage.suits is not None), key=lambda storage: storage.name)
    if not quantised:
        return ExpertChoice(wanted or FLOAT_DTYPE)
    suited = {storage.suits for storage in quantised if storage.suits is not None}
    followed: ExpertDtype = suited.pop() if len(suited) == 1 and len(found) == len(quantised) else "int8"
    names = "; ".join(storage.name for storage in quantised)
    if wanted is not None and wanted != followed:
        return ExpertChoice(
            wanted, f"the file has its experts as {names}; they are packed as {wanted}: {_measure(followed)}"
        )
    return ExpertChoice(
        followed, f"experts are {followed}, as suits the file ({names}): {_change(followed, quantised)}"
    )


def _change(followed: ExpertDtype, quantised: Iterable[Storage]) -> str:
    changes = {storage.remark if storage.suits == followed else "rounded again" for storage in quantised}
    text = "; ".join(sorted(changes))
    if followed == "int4" or "rounded again" not in changes:
        return text
    return f"{text}, by less than int4 would (--dtype int4 takes half the memory)"


def _measure(followed: ExpertDtype) -> str:
    return f"{followed} suits it; `hybrimoe inspect` measures what each dtype adds"


def wanted_dtype(expert_dtype: str) -> ExpertDtype | None:
    """What a deployment's `cpu.expert_dtype` asks for; None for "auto"."""
    return next((dtype for dtype in DTYPES if dtype == expert_dtype), None)
