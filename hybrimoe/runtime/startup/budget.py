"""What fits a device: its free memory without what must stay free, in slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from cpu_kernels import ExpertSpec
from gpu_kernels import Accelerator
from hybrimoe.errors import BudgetError

EMULATED_AUTO_SHARE = 0.25
"""Share of all experts that "auto" caches on the emulated accelerator: the paper's tightest setting."""
DEVICE_RESERVE_BYTES = 512 << 20
"""Left free on a real device for activations and the allocator's fragmentation."""
DEFAULT_KV_RESERVE_BYTES = 1 << 30
"""KV room where neither the setting nor the model's configuration says more."""
KV_TOKENS = 8192
"""Context that "auto" keeps KV room for, if the model's own is not shorter."""
KV_VALUE_BYTES = 2
"""Keys and values are kept in 16 bits."""


def unpack_bytes(spec: ExpertSpec) -> int:
    """Device bytes at the peak of unpacking one expert for a prompt's tokens: its matrices in float32, and two more,
    for gate and up while they are taken apart, or for one that is being dequantised."""
    matrices = 5 if spec.activation.gated else 4
    return matrices * 4 * spec.layout.hidden_padded * spec.layout.inter_padded


@dataclass(frozen=True, slots=True)
class PlannedMemory:
    """Bytes of one device by what they are for. dense: weights and buffers there; slots: of experts. Still free: kv for
    keys and values, unpack for one expert that a prompt takes apart, reserve for activations, workspaces of torch's
    libraries, recorded steps and what their calls hand over."""

    dense: int
    slots: int
    kv: int
    unpack: int
    reserve: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.dense + self.slots + self.kv + self.unpack + self.reserve


def planned_memory(
    accelerators: Sequence[Accelerator], specs: Iterable[ExpertSpec], model: nn.Module | None,
    kv_reserve_bytes: int | None,
) -> list[PlannedMemory]:  # fmt: skip
    """What each accelerator holds, and what its slots leave free there. specs: of experts that may have a slot."""
    kv_bytes = kv_cache_bytes(model) if kv_reserve_bytes is None else kv_reserve_bytes
    unpack = max(map(unpack_bytes, specs), default=0)
    tensors = {id(t): t for t in ([] if model is None else [*model.parameters(), *model.buffers()])}
    return [
        PlannedMemory(
            sum(tensor.nbytes for tensor in tensors.values() if tensor.device == device.device),
            device.n_slots * device.slot_bytes, kv_bytes if index == 0 else 0, unpack, DEVICE_RESERVE_BYTES,
        )
        for index, device in enumerate(accelerators)
    ]  # fmt: skip


def reserve_bytes(
    model: nn.Module | None, accelerator: Accelerator, kv_reserve_bytes: int | None, specs: Iterable[ExpertSpec]
) -> int:
    """Device bytes that slots must leave: KV cache, dense weights that are still to be loaded, activations, and one of
    the largest experts unpacked."""
    if accelerator.free_bytes() is None:
        return 0
    kv_bytes = kv_cache_bytes(model) if kv_reserve_bytes is None else kv_reserve_bytes
    dense_bytes = 0
    if model is not None:
        dense_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.device != accelerator.device)
    return kv_bytes + dense_bytes + DEVICE_RESERVE_BYTES + max(map(unpack_bytes, specs), default=0)


def kv_cache_bytes(model: nn.Module | None) -> int:
    """Keys and values of KV_TOKENS tokens (or the model's whole context), from its configuration."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    n_layers, heads = _size(config, "num_hidden_layers"), _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    if not (n_layers and heads and hidden):
        return DEFAULT_KV_RESERVE_BYTES
    head_dim = _size(config, "head_dim") or hidden // heads
    kv_heads = _size(config, "num_key_value_heads") or heads
    n_tokens = min(KV_TOKENS, _size(config, "max_position_embeddings") or KV_TOKENS)
    return 2 * n_layers * kv_heads * head_dim * KV_VALUE_BYTES * n_tokens


def _size(config: object, name: str) -> int:
    """A number of the configuration; 0 where it has none, or (as some do by raising) none for all layers."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:
        return 0
    return value if isinstance(value, int) else 0


def auto_slots(n_experts: int, slot_bytes: int, accelerator: Accelerator, reserve: int) -> int:
    """Slots for `n_experts` experts of at most `slot_bytes` each that fit the device beside `reserve` bytes.

    Raises BudgetError where not even one fits.
    """
    if not n_experts:
        return 0
    free_bytes = accelerator.free_bytes()
    if free_bytes is None:
        return max(1, round(EMULATED_AUTO_SHARE * n_experts))
    slots = (free_bytes - reserve) // slot_bytes
    if slots < 1:
        raise BudgetError(
            f"{accelerator.name} has {free_bytes / 2**20:.0f} MiB free, of which {reserve / 2**20:.0f} MiB are kept for"
            f" the KV cache, dense weights and activations, so one expert of {slot_bytes / 2**20:.1f} MiB does not fit."
            " Set gpu_expert_slots to 0 (all experts on the CPU), lower the kv budget, or choose a smaller expert_dtype"
        )
    return min(int(slots), n_experts)
