"""The most precise weights that a machine has room for: behind `--fit`. No weights are read."""

from __future__ import annotations

from dataclasses import dataclass

from hybrimoe.errors import BudgetError
from hybrimoe.tracing.study.planning import Fit, fit
from scheduler.machine.profile import HardwareProfile, ModelShape

__all__ = ["CANDIDATES", "Choice", "choose"]

CANDIDATES = (("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "int8"))
"""Dtypes of experts and of all other weights, the most precise first; int4 dense layers are for who asks for them."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, what of the model fits with it, and why nothing more precise was."""

    expert_dtype: str
    dense_dtype: str
    fit: Fit
    reasons: tuple[str, ...]

    @property
    def needs_disk(self) -> bool:
        """Whether experts stay on disk, because none of the candidates fits host memory."""
        return self.fit.disk_experts > 0


def choose(
    shape: ModelShape, profile: HardwareProfile, *, context: int | None, device_bytes: int | None, host_bytes: int
) -> Choice:
    """The first candidate with room for all experts in host memory; else the last one that runs at all, with disk.

    Raises as `planning.fit` for a model that fits in no way.
    """
    reasons: list[str] = []
    last: Choice | None = None
    failure: BudgetError | None = None
    for expert_dtype, dense_dtype in CANDIDATES:
        what = f"{expert_dtype} experts with {dense_dtype} dense weights"
        try:
            found = fit(
                shape, profile, context=context, expert_dtype=expert_dtype, dense_dtype=dense_dtype,
                device_bytes=device_bytes, host_bytes=host_bytes,
            )  # fmt: skip
        except BudgetError as error:
            failure = error
            reasons.append(f"{what}: {error}")
            continue
        if not found.disk_experts:
            reasons.append(f"{what}: everything fits, and nothing more precise does" if reasons else f"{what} fit")
            return Choice(expert_dtype, dense_dtype, found, tuple(reasons))
        reasons.append(f"{what}: {found.disk_experts} of {found.n_experts} experts do not fit host memory")
        last = Choice(expert_dtype, dense_dtype, found, ())
    if last is None:
        assert failure is not None
        raise failure
    reasons.append("what does not fit host memory is read from disk when it is needed (memory.disk: auto)")
    return Choice(last.expert_dtype, last.dense_dtype, last.fit, tuple(reasons))
