"""Router output grouped by expert, and the sum of the experts' rows per token."""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.errors import DispatchError
from cpu_kernels.jit.compiled import kernel


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """The router output of one layer, grouped by expert.

    A row is a flat index ``token * top_k + j`` of the router output. Rows of expert ``expert_ids[i]`` are
    ``rows[offsets[i]:offsets[i + 1]]``. Rows of absent entries (id -1 or >= num_experts) are in no group.
    """

    top_k: int
    n_tokens: int
    expert_ids: np.ndarray  # int32 [A], ascending
    offsets: np.ndarray  # int32 [A + 1]
    rows: np.ndarray  # int32 [N], grouped by expert, ascending inside a group
    weights: np.ndarray  # float32 [n_tokens * top_k], routing weight of each row

    @property
    def n_tokens_per_expert(self) -> np.ndarray:
        """int32 [A]: rows of each active expert."""
        return np.diff(self.offsets)

    @property
    def has_absent(self) -> bool:
        """Whether some rows belong to no expert."""
        return len(self.rows) != self.n_tokens * self.top_k


def build_dispatch(top_k_index: np.ndarray, top_k_weights: np.ndarray, num_experts: int) -> Dispatch:
    """Groups router output by expert.

    top_k_index: integer [T, k]; -1 and ids >= num_experts are absent. top_k_weights: float32 [T, k].
    An expert that a token names twice gets two rows, which add up. Raises DispatchError on wrong shapes or dtypes,
    ids below -1 and weights that are not finite.
    """
    if top_k_index.ndim != 2 or top_k_index.dtype.kind not in "iu":
        raise DispatchError(f"top_k_index must be an integer array [T, k], found {_describe(top_k_index)}")
    if top_k_weights.shape != top_k_index.shape or top_k_weights.dtype != np.float32:
        raise DispatchError(
            f"top_k_weights must be float32{list(top_k_index.shape)} like top_k_index, found {_describe(top_k_weights)}"
        )
    if num_experts < 1:
        raise DispatchError(f"num_experts must be at least 1, found {num_experts}")
    flat = np.ascontiguousarray(top_k_index, dtype=np.int64).reshape(-1)
    weights = np.ascontiguousarray(top_k_weights).reshape(-1)
    expert_ids, offsets, rows, problem = group_rows(flat, weights, num_experts)
    if problem >= 0:
        raise DispatchError(
            f"token {problem // top_k_index.shape[1]}: expert id {flat[problem]} with weight {weights[problem]}; "
            "expected ids from -1 (absent) up and finite weights"
        )
    return Dispatch(top_k_index.shape[1], top_k_index.shape[0], expert_ids, offsets, rows, weights)


def combine(out_rows: np.ndarray, dispatch: Dispatch, out: np.ndarray) -> None:
    """Sums each token's rows in top-k order into `out`; absent rows count as 0, whatever they hold.

    out_rows: float32 [T * top_k, H] (already times the routing weight); out: float32 [T, H], overwritten.
    The order is fixed, so the bits do not depend on where an expert ran.
    """
    n_rows = dispatch.n_tokens * dispatch.top_k
    hidden = out.shape[1] if out.ndim == 2 else -1
    for name, array, shape in (("out_rows", out_rows, (n_rows, hidden)), ("out", out, (dispatch.n_tokens, hidden))):
        if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous:
            raise DispatchError(f"{name} must be C-contiguous float32{list(shape)}, found {_describe(array)}")
    if np.may_share_memory(out_rows, out):
        raise DispatchError("out_rows and out overlap; give combine() two separate buffers")
    present = present_rows(dispatch.rows, n_rows)
    combine_rows(out_rows, present, dispatch.top_k, out)


@kernel
def take_records(
    addresses: np.ndarray, expert_ids: np.ndarray, chosen: np.ndarray, positions: np.ndarray, records: np.ndarray
) -> None:
    """What `CpuBackend.run` reads of the active experts (int32 [A]) at places `chosen` (int64 [n]), into positions
    (int32) and records (uint64): `addresses` (uint64 [E]) of each."""
    for i in range(chosen.size):
        positions[i] = chosen[i]
        records[i] = addresses[expert_ids[chosen[i]]]


def _describe(array: np.ndarray) -> str:
    layout = "" if array.flags.c_contiguous else ", not contiguous"
    return f"{array.dtype}{list(array.shape)}{layout}"


@kernel
def group_rows(
    flat: np.ndarray, weights: np.ndarray, num_experts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Counting sort of rows by expert: ids, offsets and rows of a Dispatch; `problem` is the first bad row or -1."""
    most = min(num_experts, flat.size)
    expert_ids, offsets = np.empty(most, np.int32), np.empty(most + 1, np.int32)
    rows = np.empty(flat.size, np.int32)
    n_active, problem = group_rows_into(flat, weights, np.empty(num_experts, np.int32), expert_ids, offsets, rows)
    return expert_ids[:n_active], offsets[: n_active + 1], rows[: offsets[n_active]], problem


@kernel
def group_rows_into(
    flat: np.ndarray, weights: np.ndarray, counts: np.ndarray, expert_ids: np.ndarray, offsets: np.ndarray,
    rows: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """`group_rows` into memory of the caller: (number of active experts, the first bad row or -1).

    counts int32 [E] is overwritten; expert_ids [A], offsets [A + 1], rows [N], all int32, have room for the result.
    """
    num_experts = counts.size
    counts[:] = 0
    problem = -1
    for row in range(flat.size):
        if flat[row] < -1 or not np.isfinite(weights[row]):
            problem = row
            break
        if 0 <= flat[row] < num_experts:
            counts[flat[row]] += 1
    n_active = 0
    offsets[0] = 0
    for expert in range(num_experts):
        if counts[expert] > 0:
            expert_ids[n_active] = expert
            offsets[n_active + 1] = offsets[n_active] + counts[expert]
            counts[expert] = offsets[n_active]
            n_active += 1
    for row in range(flat.size if problem < 0 else 0):
        expert = flat[row]
        if 0 <= expert < num_experts:
            rows[counts[expert]] = row
            counts[expert] += 1
    return n_active, problem


@kernel
def present_rows(rows: np.ndarray, n_rows: int) -> np.ndarray:
    """bool [n_rows]: rows of an expert; empty where all are."""
    if rows.size == n_rows:
        return np.zeros(0, np.bool_)
    present = np.zeros(n_rows, np.bool_)
    for row in rows:
        present[row] = True
    return present


@kernel
def combine_rows(out_rows: np.ndarray, present: np.ndarray, top_k: int, out: np.ndarray) -> None:
    for token in range(out.shape[0]):
        target = out[token]
        target[:] = np.float32(0)
        for row in range(token * top_k, (token + 1) * top_k):
            if present.size == 0 or present[row]:
                source = out_rows[row]
                for column in range(target.size):
                    target[column] += source[column]
