"""Keys or values as a KV cache stores them, which stand where their floats are expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map

from cpu_kernels.step.kv_rows import FLOAT_KINDS, load_tokens
from cpu_kernels.step.stored import INT8


class StoredStates(torch.Tensor):
    """A tensor [B, heads, T, D] whose values lie in `rows` [B, heads, T, row], stored as `kind`.

    Whoever knows it reads blocks of rows (`block`). Every operation of torch on it is given the floats of all rows,
    which are made then: code that knows nothing of it works as with any tensor.
    """

    rows: torch.Tensor
    kind: int
    _floats: torch.Tensor | None

    @classmethod
    def of(cls, rows: torch.Tensor, kind: int, like: torch.Tensor) -> Self:
        """like: [..., D] of the dtype that the floats have."""
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, (*rows.shape[:3], like.shape[-1]), dtype=like.dtype, device=like.device
        )
        made.rows, made.kind, made._floats = rows, kind, None
        return made

    @property
    def turned(self) -> bool:
        """Whether blocks are turned (`stored.turn`), as the queries that meet them must be."""
        return self.kind >= INT8

    def block(self, first: int, stop: int, dtype: torch.dtype, threads: int | None = None) -> torch.Tensor:
        """Floats [B, heads, stop - first, D] of tokens from `first` on, still turned where rows are.

        dtype: float32 or bfloat16. threads: as in `get_backend`.
        """
        floats = torch.empty(*self.rows.shape[:2], stop - first, self.shape[-1], dtype=dtype)
        load_tokens(self.kind, self.rows[..., first:stop, :], floats, threads, as_stored=True)
        return floats

    def floats(self) -> torch.Tensor:
        """All of it as a plain tensor."""
        if self._floats is None:
            dtype = self.dtype if self.dtype in FLOAT_KINDS else torch.float32
            floats = torch.empty(*self.rows.shape[:3], self.shape[-1], dtype=dtype)
            load_tokens(self.kind, self.rows, floats)
            self._floats = floats.to(self.dtype)
        return self._floats

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """torch's call of one of its functions."""
        if getattr(func, "__name__", "") == "__get__" or func in TOLD_BY_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        return func(*_as_floats(args), **_as_floats(dict(kwargs or {})))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch names its own differently
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The same for what reaches torch's operators by another way."""
        return func(*_as_floats(args), **_as_floats(dict(kwargs or {})))


TOLD_BY_SHAPE = frozenset((torch.Tensor.dim, torch.Tensor.size, torch.Tensor.numel, torch.Tensor.is_floating_point))
"""Methods that need no values."""


def _as_floats(arguments: Any) -> Any:
    return tree_map(lambda one: one.floats() if isinstance(one, StoredStates) else one, arguments)
