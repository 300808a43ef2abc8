"""`cpu.dense_dtype: int8` or `int4`: the linear layers around the experts (attention, shared experts, lm_head), packed.

Weights take 8.5 or 4.5 bits instead of 16 or 32 and are read at that rate by the kernels of `cpu_kernels`;
activations are rounded to int8 per group of 32, as in quantised experts. Routers stay as they are: a wrong expert costs
more than the few bytes of a router. With int4 the output layer is int8: each error in it is one in the logits.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from cpu_kernels import LinearSpec, pack_linear, run_linear, unpack_linear, unpack_linear_blocks
from hybrimoe.dense.records import DenseRecords, LinearEntry
from hybrimoe.errors import CheckpointError, ModelError
from hybrimoe.experts.absent import AbsentWeights
from hybrimoe.experts.towers import in_tower, tower_paths

PackedDtype = Literal["int8", "int4"]
ROUTER_NAME = re.compile(r"(^|\.)(gate|router|classifier|shared_expert_gate)(\.|$)")
MIN_FEATURES = 32
"""Smaller matrices are not worth a kernel call."""


class PackedLinear(nn.Module):
    """y = x W^T + b, W packed in groups of 32 and frozen. Takes the place of an `nn.Linear` on the CPU.

    Gradients go through W, dequantised, to x, and to b. `state_dict()` has the layer's own weight where it was kept,
    else a placeholder that refuses to be saved or read; loading a weight raises ModelError, and so does pickling.
    """

    def __init__(
        self, linear: nn.Linear, dtype: PackedDtype = "int8", threads: int | None = None, *,
        keep_original: bool = False, record: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """linear: finite weights on the CPU. threads: as in `cpu_kernels.get_backend`. keep_original: hold on to it.

        record: its weights, packed already; those of `linear` are not looked at then and may be on the meta device.
        Raises CheckpointError where a weight is not finite.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.spec = LinearSpec(linear.in_features, linear.out_features, dtype)
        self.bias = linear.bias
        self.weight_dtype = linear.weight.dtype
        self._threads = threads
        self.__dict__["_original"] = linear if keep_original else None  # no submodule: it has no place in the model
        self._record = self._packed(linear) if record is None else record

    def _packed(self, linear: nn.Linear) -> np.ndarray:
        if not bool(torch.isfinite(linear.weight).all()):
            raise CheckpointError("a dense weight is NaN or infinite; the checkpoint is damaged")
        record = _aligned_bytes(self.spec.record_bytes)
        pack_linear(self.spec, linear.weight.detach(), record)
        return record

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weights [out_features, in_features], made anew at each access, for code that asks."""
        return unpack_linear(self.spec, self._record).to(self.weight_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        """A weight that is assigned, as `tie_weights` does, must be the one that is packed already.

        Raises ModelError for any other: the packed bytes may be shared with copies and read by a compiled step.
        """
        if name != "weight":
            super().__setattr__(name, value)
            return
        self._require_packed(value)
        if self.original is not None:
            self.original.weight = value

    def _require_packed(self, weight: torch.Tensor) -> None:
        packed = None
        if weight.shape == (self.out_features, self.in_features) and bool(torch.isfinite(weight).all()):
            packed = _aligned_bytes(self.spec.record_bytes)
            pack_linear(self.spec, weight.detach(), packed)
        if packed is None or not np.array_equal(packed, self._record):
            raise ModelError(
                f"a linear layer of {self.out_features} x {self.in_features} is packed as {self.spec.dtype}"
                f" (cpu.dense_dtype), and the weight {list(weight.shape)} that it should take is not the packed one:"
                " call model.hybrimoe.restore() first and inject again afterwards"
            )

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
        if torch.compiler.is_compiling():
            compiled: torch.Tensor = self._run_outside_graphs(x)
            return compiled
        rows = x.reshape(-1, self.in_features).to(torch.float32).contiguous()
        if torch.is_grad_enabled() and rows.requires_grad:
            out: torch.Tensor = FrozenProduct.apply(self, rows)  # type: ignore[no-untyped-call]
        else:
            out = self.product(rows)
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """x W^T without gradient: contiguous float32 [T, in_features] -> float32 [T, out_features]."""
        out = torch.empty(rows.shape[0], self.out_features)
        if len(rows):
            run_linear(self.spec, self._record.ctypes.data, rows.detach().numpy(), out.numpy(), self._threads)
        return out

    def product_with_weight(self, rows: torch.Tensor) -> torch.Tensor:
        """x W, the way back: float32 [T, out_features] -> float32 [T, in_features], from a block of W at a time."""
        result = torch.zeros(rows.shape[0], self.in_features)
        for start, block in unpack_linear_blocks(self.spec, self._record):
            result.addmm_(rows[:, start : start + len(block)], block)
        return result

    @property
    def original(self) -> nn.Linear | None:
        """The layer that stood here, where it was kept."""
        original: nn.Linear | None = self.__dict__["_original"]
        return original

    def full_weights(self) -> dict[str, torch.Tensor]:
        """`weight` [out_features, in_features] by its name: the layer's own where it was kept, else dequantised."""
        return {"weight": self.weight if self.original is None else self.original.weight.detach()}

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bias={self.bias is not None}, {self.spec.dtype}"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        """A copy shares the packed bytes, which nothing writes to."""
        twin = PackedLinear.__new__(PackedLinear)
        memo[id(self)] = twin
        memo[id(self._record)] = self._record
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """What is packed for this machine's kernels is not a way to keep a model."""
        raise ModelError(
            "a model with packed dense layers cannot be pickled: call model.hybrimoe.restore() first, or write it with"
            " save_pretrained"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_outside_graphs(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` as one break in a compiled graph."""
        return self.forward(x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.original is not None:
            self.original._save_to_state_dict(destination, prefix, keep_vars)
            return
        shape = torch.empty(self.out_features, self.in_features, dtype=self.weight_dtype, device="meta")
        destination[prefix + "weight"] = AbsentWeights.like(shape, prefix + "weight")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if prefix + "weight" in state_dict:
            raise ModelError(
                f"{prefix}weight is packed as {self.spec.dtype} (cpu.dense_dtype), into which nothing can be loaded:"
                " call model.hybrimoe.restore() first and inject again afterwards"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if strict:
            missing_keys.append(prefix + "weight")


class FrozenProduct(torch.autograd.Function):
    """x W^T of a PackedLinear, differentiated with respect to x."""

    @staticmethod
    def forward(ctx: Any, linear: PackedLinear, rows: torch.Tensor) -> torch.Tensor:
        """rows: contiguous float32 [T, in_features] -> float32 [T, out_features]."""
        ctx.linear = linear
        return linear.product(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[None, torch.Tensor]:
        """Gradient of rows."""
        return None, ctx.linear.product_with_weight(grad_out)


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
    threads: int | None = None, records: DenseRecords | None = None,
) -> PackedDense:  # fmt: skip
    """Packs every `nn.Linear` of `model` that is on the CPU and is no router; the output layer never below int8.

    Left alone are layers that have hooks or a forward of their own, layers that carry an adapter, and, where some
    weights of the model are frozen, those that are not: they are being trained.

    num_experts: sizes of the model's routers; a layer with so many outputs whose name does not say otherwise is taken
    for one. keep_originals: hold on to the layers, so that `undo` can put them back. records: what of them is packed
    already; the weights of such layers may be on the meta device.
    """
    packed = PackedDense()
    try:
        for candidate in _candidates(model, num_experts, dtype):
            record = None if records is None or candidate.path not in records else records.record(candidate.path)
            if record is not None or candidate.linear.weight.device.type == "cpu":
                _replace(packed, candidate, record, keep_originals=keep_originals, threads=threads)
        _call_once(packed, model)
    except BaseException:
        if packed.reversible:
            packed.undo()
        raise
    return packed


def linear_entries(model: nn.Module, num_experts: frozenset[int], dtype: PackedDtype) -> list[LinearEntry]:
    """What `pack_linears` would pack of a model whose weights are on the CPU or still on the meta device."""
    return [
        LinearEntry(one.path, LinearSpec(one.linear.in_features, one.linear.out_features, one.dtype), weight.dtype)
        for one in _candidates(model, num_experts, dtype)
        if (weight := one.linear.weight).device.type in ("cpu", "meta")
    ]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A linear layer that is to be packed as `dtype`, at `path`: the attribute `name` of `parent`."""

    path: str
    parent: nn.Module
    name: str
    linear: nn.Linear
    dtype: PackedDtype


def _candidates(model: nn.Module, num_experts: frozenset[int], dtype: PackedDtype) -> Iterator[_Candidate]:
    some_frozen = any(not weight.requires_grad for weight in model.parameters())
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    towers = tower_paths(model)  # what they compute of an image is not worth rounding: they run once for each
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            full = f"{path}.{name}" if path else name
            if type(child) is not nn.Linear or in_tower(full, towers):
                continue
            if not _worth_packing(full, child, num_experts):
                continue
            if not _is_plain(child) or "base_layer" in parent._modules or (some_frozen and child.weight.requires_grad):
                continue
            yield _Candidate(full, parent, name, child, "int8" if child is output else dtype)


def _replace(
    packed: PackedDense, candidate: _Candidate, record: np.ndarray | None, *, keep_originals: bool, threads: int | None
) -> None:
    """Puts the packed layer in the place of the candidate and notes it in `packed`."""
    linear = candidate.linear
    replacement = PackedLinear(linear, candidate.dtype, threads, keep_original=keep_originals, record=record)
    replacement.train(linear.training)
    setattr(candidate.parent, candidate.name, replacement)
    packed.paths.append(candidate.path)
    packed.originals.append((candidate.parent, candidate.name, linear if keep_originals else None))
    packed.nbytes += replacement.record_bytes


def _call_once(packed: PackedDense, model: nn.Module) -> None:
    """Compiles (or loads) what the first reply would otherwise wait for: the smallest layer of each dtype is called."""
    smallest: dict[str, PackedLinear] = {}
    for layer in map(model.get_submodule, packed.paths):
        assert isinstance(layer, PackedLinear)
        known = smallest.setdefault(layer.spec.dtype, layer)
        if layer.record_bytes < known.record_bytes:
            smallest[layer.spec.dtype] = layer
    for layer in smallest.values():
        layer.product(torch.zeros(1, layer.in_features))


def _worth_packing(path: str, linear: nn.Linear, num_experts: frozenset[int]) -> bool:
    if min(linear.in_features, linear.out_features) < MIN_FEATURES:
        return False
    return not ROUTER_NAME.search(path) and linear.out_features not in num_experts


def _is_plain(linear: nn.Linear) -> bool:
    """Whether calling the layer does nothing but its product."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return "forward" not in linear.__dict__ and not any(hooks)


def _aligned_bytes(n_bytes: int, alignment: int = 64) -> np.ndarray:
    """uint8 [n_bytes] that starts on a cache line."""
    raw = np.zeros(n_bytes + alignment, dtype=np.uint8)  # what packing leaves out compares as equal
    start = -raw.ctypes.data % alignment
    return raw[start : start + n_bytes]
