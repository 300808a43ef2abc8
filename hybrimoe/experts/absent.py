"""What stands in a `state_dict()` for weights that exist only packed: a tensor that can be listed, and not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from hybrimoe.errors import ModelError

READABLE = frozenset(
    {"__get__", "dim", "ndimension", "numel", "nelement", "size", "stride", "is_floating_point", "is_complex",
     "element_size", "__len__"}
)  # fmt: skip
"""Names of the tensor functions that answer from shape and dtype alone."""
BYTES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
"""Properties that lead to the values all the same."""


class AbsentWeights(torch.Tensor):
    """A tensor of this shape and dtype whose values are packed in the runtime; reading, copying, saving are refused.

    With it a `state_dict()` has every key, so that code which filters keys works (saving an adapter does), and no
    checkpoint is written that lacks weights or holds garbage. Every other use raises ModelError.
    """

    origin: str

    @staticmethod
    def like(tensor: torch.Tensor, origin: str) -> AbsentWeights:
        """A placeholder of the shape and dtype of `tensor`; `origin` names the weights in errors."""
        placeholder: AbsentWeights = torch.Tensor._make_wrapper_subclass(
            AbsentWeights, tensor.shape, dtype=tensor.dtype, device=torch.device("cpu")
        )
        placeholder.origin = origin
        return placeholder

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers what needs no values, refuses the rest."""
        name = function.__name__
        owner = getattr(function, "__self__", None)
        if name in READABLE and getattr(owner, "__name__", "") not in BYTES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        return _refuse(args)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub describes torch's default, which is no class method
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Whatever reaches the dispatcher asks for values."""
        _refuse(args)

    def detach(self) -> AbsentWeights:
        """Itself: it has no gradient."""
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and dtype."""
        return f"AbsentWeights({self.origin}, {self.dtype}{list(self.shape)})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Pickling (and with it torch.save) would write no weights."""
        raise ModelError(explanation(self.origin))

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """There is nothing to copy."""
        raise ModelError(explanation(self.origin))


class PackedWeightsError(ModelError, AttributeError):
    """A module was asked for a weight that it holds only packed."""


def explanation(origin: str) -> str:
    """Why these weights cannot be read, and what to do."""
    return (
        f"{origin} is packed in HybriMoE's runtime and cannot be saved, copied or read as a tensor: call"
        " model.hybrimoe.restore() first, or take model.hybrimoe.full_state_dict(), which holds what is packed,"
        " dequantised (pass it as state_dict= to save_pretrained)"
    )


def _refuse(args: Any) -> NoReturn:
    placeholders = (arg.origin for arg in args if isinstance(arg, AbsentWeights))
    raise ModelError(explanation(next(placeholders, "a weight of this model")))
