"""What fits a device: its free memory without what must stay free, in slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from cpu_kernels import ExpertSpec
from gpu_kernels import Accelerator
from gpu_kernels.devices import blas_workspace_bytes, workspace_of
from gpu_kernels.graphs import records_graphs
from gpu_kernels.torch_slots import STAGING_BUFFERS
from hybrimoe.amounts import parse_amount
from hybrimoe.errors import BudgetError
from hybrimoe.kv_sizes import number_of, text_config_of, values_expanded, values_kept

EMULATED_AUTO_SHARE = 0.25
"""Share of all experts that "auto" caches on the emulated accelerator: the paper's tightest setting."""
DEVICE_RESERVE_BYTES = 512 << 20
"""Left free on a real device, at least: for workspaces, recorded steps, activations and gaps between allocations."""
ACTIVATIONS_BYTES = 256 << 20
"""At least, of the last two."""
RECORDED_STEPS = 4
"""Steps whose graphs are kept: of the latest conversations, and of numbers of sequences."""
SMALL_SEGMENT_BYTES, LARGE_SEGMENT_BYTES = 2 << 20, 20 << 20
"""What torch's allocator takes of a device at once, for tensors up to 1 MiB and for larger ones."""
ROUNDED_BYTES = 512
"""Its sizes are multiples of this."""
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
class KeptFree:
    """Device bytes that nothing of a model takes for good. workspaces: of torch's library of matrix products; graphs:
    recorded steps, with the memory that their pieces compute in; reserve: activations, and what lies between the
    allocator's blocks."""

    workspaces: int
    graphs: int
    reserve: int

    @classmethod
    def beside(cls, workspaces: int, graphs: int) -> KeptFree:
        """With what these leave of DEVICE_RESERVE_BYTES, and enough for activations in any case."""
        return cls(workspaces, graphs, max(ACTIVATIONS_BYTES, DEVICE_RESERVE_BYTES - workspaces - graphs))

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.workspaces + self.graphs + self.reserve


def kept_free(device: torch.device | None, graphs: int) -> KeptFree:
    """What a device keeps free where recorded steps take `graphs` bytes of it; None: a card that is not here, of the
    kind that takes most. A thread multiplies on its current stream, and on another one what it records."""
    if device is None:
        return KeptFree.beside(2 * workspace_of(None), graphs)
    records = records_graphs(device)
    return KeptFree.beside((2 if records else 1) * blas_workspace_bytes(device), graphs if records else 0)


def graph_bytes(n_layers: int, width: int, vocabulary: int) -> int:
    """What recorded steps of a model take: each has segments of torch's allocator of its own, in which it keeps hidden
    states, routing and weights of each layer (small tensors), logits and parts of attention (larger ones)."""
    small = n_layers * (4 * width + 4 * ROUNDED_BYTES)
    large = 4 * vocabulary + LARGE_SEGMENT_BYTES // 2
    return RECORDED_STEPS * (_segments(small, SMALL_SEGMENT_BYTES) + _segments(large, LARGE_SEGMENT_BYTES))


def _segments(n_bytes: int, size: int) -> int:
    return -(-n_bytes // size) * size


@dataclass(frozen=True, slots=True)
class PlannedMemory:
    """Bytes of one device by what they are for. dense: weights and buffers there; slots: of experts. Still free: kv for
    keys and values, unpack for one expert that a prompt takes apart; workspaces, graphs and reserve as in `KeptFree`,
    the reserve with what latent attention makes of its short vectors in one layer.
    staging: of page-locked memory of the host, where records that could not be locked themselves are copied first."""

    dense: int = 0
    slots: int = 0
    kv: int = 0
    unpack: int = 0
    workspaces: int = 0
    graphs: int = 0
    reserve: int = 0
    staging: int = 0

    @property
    def total(self) -> int:
        """Of all parts on the device."""
        return self.held + self.kv + self.unpack + self.reserve

    @property
    def held(self) -> int:
        """What is taken before anything is computed but a first step."""
        return self.dense + self.slots + self.workspaces + self.graphs


def planned_memory(
    accelerators: Sequence[Accelerator], specs: Iterable[ExpertSpec], model: nn.Module | None,
    kv_reserve_bytes: int | None, *, locked: bool = True,
) -> list[PlannedMemory]:  # fmt: skip
    """What each accelerator holds, and what its slots leave free there. specs: of experts that may have a slot. locked:
    whether the device reads the host's records by itself. Keys and values are on the first one; a device in the host's
    memory keeps nothing free."""
    tensors = {id(t): t for t in ([] if model is None else [*model.parameters(), *model.buffers()])}
    specs, planned = tuple(specs), []
    for index, device in enumerate(accelerators):
        dense = sum(tensor.nbytes for tensor in tensors.values() if tensor.device == device.device)
        slots = device.n_slots * device.slot_bytes
        if device.free_bytes() is None:
            planned.append(PlannedMemory(dense=dense, slots=slots))
            continue
        beside = beside_slots(
            device.device, specs, model if index == 0 else None, kv_reserve_bytes if index == 0 else 0
        )
        staging = 0 if locked or not device.needs_pinned_host() else STAGING_BUFFERS * device.slot_bytes
        planned.append(replace(beside, dense=dense, slots=slots, staging=staging))
    return planned


def beside_slots(
    device: torch.device | None, specs: Iterable[ExpertSpec], model: nn.Module | None, kv_reserve_bytes: int | None
) -> PlannedMemory:
    """What a device keeps free: all parts but weights and slots. device: as in `kept_free`."""
    kv_bytes = kv_cache_bytes(model) if kv_reserve_bytes is None else kv_reserve_bytes
    free = kept_free(device, graphs_of_model(model))
    unpack = max(map(unpack_bytes, specs), default=0)
    return PlannedMemory(
        kv=kv_bytes, unpack=unpack, workspaces=free.workspaces, graphs=free.graphs,
        reserve=free.reserve + expanded_bytes(model),
    )  # fmt: skip


def graphs_of_model(model: nn.Module | None) -> int:
    """`graph_bytes` by a model's configuration; 0 where there is none."""
    config = text_config_of(model)
    sizes = [number_of(config, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    return graph_bytes(*sizes) if all(sizes) else 0


def reserve_bytes(
    model: nn.Module | None, accelerator: Accelerator, kv_reserve_bytes: int | None, specs: Iterable[ExpertSpec]
) -> int:
    """Device bytes that slots must leave: KV cache, dense weights that are still to be loaded, what is kept free, and
    one of the largest experts unpacked."""
    if accelerator.free_bytes() is None:
        return 0
    dense_bytes = 0
    if model is not None:
        dense_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.device != accelerator.device)
    return dense_bytes + beside_slots(accelerator.device, specs, model, kv_reserve_bytes).total


def kv_cache_bytes(model: nn.Module | None) -> int:
    """Keys and values of KV_TOKENS tokens (or the model's whole context), from its configuration."""
    config = text_config_of(model)
    return KV_VALUE_BYTES * values_kept(config, _planned_tokens(config)) or DEFAULT_KV_RESERVE_BYTES


def expanded_bytes(model: nn.Module | None) -> int:
    """What latent attention makes of as many tokens in one layer, beside other activations."""
    config = text_config_of(model)
    return KV_VALUE_BYTES * values_expanded(config, _planned_tokens(config))


def _planned_tokens(config: object) -> int:
    return min(KV_TOKENS, number_of(config, "max_position_embeddings") or KV_TOKENS)


def slots_asked_for(setting: int | float | str, n_experts: int, slot_bytes: int) -> int:
    """Slots that a setting asks for of so many experts; "auto": what an emulated accelerator takes. Errors as
    `Amount.to_experts`."""
    if not n_experts:
        return 0
    auto = max(1, round(EMULATED_AUTO_SHARE * n_experts))
    return parse_amount(setting).to_experts(n_experts, slot_bytes, auto=auto)


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
