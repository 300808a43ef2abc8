"""Output tensors made several at a time: after kernels that stream weights, one alone takes ten times as long."""

import torch

AT_ONCE = 16
"""Outputs that are made together: the first takes about 10 us where torch's code has left the caches, others 0.5."""
MAX_BYTES = 1 << 20
"""Of those that wait for their use."""


class Outputs:
    """Contiguous host tensors of the shape that was asked for last, each given away once, with its address.

    Not safe to share between threads.
    """

    __slots__ = ("_form", "_left")

    def __init__(self) -> None:
        self._form: tuple[torch.Size, torch.dtype, bool] | None = None
        self._left: list[tuple[torch.Tensor, int]] = []

    def take(self, like: torch.Tensor) -> tuple[torch.Tensor, int]:
        """A tensor like `like`, which lies contiguous on the host, and its address; contents undefined."""
        form = like.shape, like.dtype, torch.is_inference_mode_enabled()
        if not self._left or self._form != form:
            self._make(*form)
        return self._left.pop()

    def _make(self, shape: torch.Size, dtype: torch.dtype, inference: bool) -> None:
        n = max(1, min(AT_ONCE, MAX_BYTES // max(1, shape.numel() * dtype.itemsize)))
        made = [torch.empty(shape, dtype=dtype, device="cpu") for _ in range(n)]
        self._form, self._left = (shape, dtype, inference), [(tensor, tensor.data_ptr()) for tensor in made]
