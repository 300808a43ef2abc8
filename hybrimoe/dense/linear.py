"""`cpu.dense_dtype: int8` or `int4`: the linear layers around the experts (attention, shared experts, lm_head), packed.

Weights take 8.5 or 4.5 bits instead of 16 or 32 and are read at that rate by the kernels of `cpu_kernels`;
activations are rounded to int8 per group of 32, as in quantised experts. Routers stay as they are: a wrong expert costs
more than the few bytes of a router. With int4 the output layer is int8: each error in it is one in the logits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from cpu_kernels import LinearSpec, pack_linear, run_linear, unpack_linear
from hybrimoe.errors import CheckpointError

PackedDtype = Literal["int8", "int4"]
ROUTER_NAME = re.compile(r"(^|\.)(gate|router|classifier|shared_expert_gate)(\.|$)")
MIN_FEATURES = 32
"""Smaller matrices are not worth a kernel call."""


class PackedLinear(nn.Module):
    """y = x W^T + b, W packed in groups of 32. Takes the place of an `nn.Linear` on the CPU; inference only."""

    def __init__(self, linear: nn.Linear, dtype: PackedDtype = "int8", threads: int | None = None) -> None:
        """linear: finite weights on the CPU. threads: as in `cpu_kernels.get_backend`.

        Raises CheckpointError where a weight is not finite.
        """
        super().__init__()
        if not bool(torch.isfinite(linear.weight).all()):
            raise CheckpointError("a dense weight is NaN or infinite; the checkpoint is damaged")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.spec = LinearSpec(linear.in_features, linear.out_features, dtype)
        self.bias = linear.bias
        self.weight_dtype = linear.weight.dtype
        self._threads = threads
        self._record = _aligned_bytes(self.spec.record_bytes)
        pack_linear(self.spec, linear.weight.detach(), self._record)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weights [out_features, in_features], made anew at each access, for code that asks."""
        return unpack_linear(self.spec, self._record).to(self.weight_dtype)

    @property
    def record_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.spec.record_bytes

    @property
    def record_address(self) -> int:
        """Where the packed weights lie, as long as this module lives."""
        return int(self._record.ctypes.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: floating [..., in_features] -> [..., out_features] in x's dtype."""
        rows = x.detach().reshape(-1, self.in_features).to(torch.float32).contiguous()
        out = torch.empty(rows.shape[0], self.out_features)
        if len(rows):
            run_linear(self.spec, self._record.ctypes.data, rows.numpy(), out.numpy(), self._threads)
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bias={self.bias is not None}, {self.spec.dtype}"


@dataclass(slots=True)
class PackedDense:
    """The linear layers that were packed, and what stood in their place (None where it was let go)."""

    paths: list[str] = field(default_factory=list)
    originals: list[tuple[nn.Module, str, nn.Linear | None]] = field(default_factory=list)
    nbytes: int = 0

    @property
    def reversible(self) -> bool:
        """Whether `undo` can give every layer back."""
        return all(original is not None for _, _, original in self.originals)

    def undo(self) -> None:
        """Puts the original layers back; needs `reversible`."""
        for parent, name, original in reversed(self.originals):
            assert original is not None
            setattr(parent, name, original)
        self.originals.clear()


def pack_linears(
    model: nn.Module, num_experts: frozenset[int], dtype: PackedDtype = "int8", *, keep_originals: bool,
    threads: int | None = None,
) -> PackedDense:  # fmt: skip
    """Packs every `nn.Linear` of `model` that is on the CPU and is no router; the output layer never below int8.

    num_experts: sizes of the model's routers; a layer with so many outputs whose name does not say otherwise is taken
    for one. keep_originals: hold on to the layers, so that `undo` can put them back.
    """
    packed = PackedDense()
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            full = f"{path}.{name}" if path else name
            if type(child) is not nn.Linear or not _worth_packing(full, child, num_experts):
                continue
            replacement = PackedLinear(child, "int8" if child is output else dtype, threads)
            replacement.train(child.training)
            setattr(parent, name, replacement)
            packed.paths.append(full)
            packed.originals.append((parent, name, child if keep_originals else None))
            packed.nbytes += replacement.record_bytes
    return packed


def _worth_packing(path: str, linear: nn.Linear, num_experts: frozenset[int]) -> bool:
    if linear.weight.device.type != "cpu" or min(linear.in_features, linear.out_features) < MIN_FEATURES:
        return False
    return not ROUTER_NAME.search(path) and linear.out_features not in num_experts


def _aligned_bytes(n_bytes: int, alignment: int = 64) -> np.ndarray:
    """uint8 [n_bytes] that starts on a cache line."""
    raw = np.empty(n_bytes + alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + n_bytes]
