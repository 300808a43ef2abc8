"""Triton's interpreter, for the scripts of this folder that are run with TRITON_INTERPRET=1: what it gets wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend_the_interpreter() -> None:
    """Makes its tensors fit to be the bounds of loops (to 3.6: NumPy 2.4 and later refuse its arrays), multiplies
    bfloat16 as numbers (to 3.6: as bits), takes the results of comparisons as masks (3.9: as integers), and rounds to
    bfloat16 as cards do (it cuts digits off)."""
    patch, builder, convert = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder, interpreter._convert_float
    dot, load, store = builder.create_dot, builder.create_masked_load, builder.create_masked_store

    def with_index(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def as_floats(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def as_mask(handle: Any) -> Any:
        return interpreter.TensorHandle(handle.data.astype(bool), tl.int1)

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._patch_lang_tensor, interpreter._convert_float = with_index, rounded
    builder.create_dot = lambda self, a, b, *more: dot(self, as_floats(a), as_floats(b), *more)
    builder.create_masked_load = lambda self, at, mask, *more: load(self, at, as_mask(mask), *more)
    builder.create_masked_store = lambda self, at, value, mask, *more: store(self, at, value, as_mask(mask), *more)
