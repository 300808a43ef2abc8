"""`Injection`: the handle of a model with hybrid experts; its counters, its explanation, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hybrimoe.config.deploy import DeployConfig
from hybrimoe.errors import ModelError
from hybrimoe.injection.application import Application
from hybrimoe.injection.explain import Explanation, explain_resolution
from hybrimoe.injection.resolve import Resolution

if TYPE_CHECKING:
    from hybrimoe.dense.attention import DecodeAttention
    from hybrimoe.dense.linear import PackedDense
    from hybrimoe.runtime.layer_call.stats import SessionStats

MARK = "hybrimoe"
"""Attribute of an injected model that holds its Injection."""


SAVE = "save_pretrained"
"""Method that an injected model refuses: it would write a checkpoint without experts."""


class Injection:
    """A model with hybrid experts: its counters, its explanation, and the way back.

    session: the runtime session; originals: the replaced modules by path; config: the deployment it was made from.
    """

    def __init__(
        self, model: nn.Module, config: DeployConfig, resolution: Resolution, application: Application
    ) -> None:
        self.model = model
        self.config = config
        self.resolution = resolution
        self.session = application.session
        self.originals: Mapping[str, nn.Module] = application.originals
        self.dense: PackedDense | None = None
        self.attention: DecodeAttention | None = None
        self._application = application
        self._active = True

    @property
    def active(self) -> bool:
        """False after `restore`."""
        return self._active

    @property
    def remarks(self) -> tuple[str, ...]:
        """What of the rules has no effect here, and why."""
        return (*self._application.remarks, *self._without_accelerator())

    def prepare_dense(self, *, keep_originals: bool) -> None:
        """What the deployment's `cpu` section says of all that is not experts: their dtype, and the attention.

        keep_originals: hold on to packed layers for `restore`. Raises CheckpointError where a weight is not finite.
        """
        cpu = self.config.cpu
        threads = cpu.threads if isinstance(cpu.threads, int) else None
        if cpu.attention == "auto":
            self._use_decode_attention(threads)
        dtype = cpu.dense_dtype
        if dtype != "int8" and dtype != "int4":
            return
        from hybrimoe.dense.linear import pack_linears

        sizes = frozenset(hit.layout.num_experts for hit in self.resolution.experts if hit.layout is not None)
        self.dense = pack_linears(self.model, sizes, dtype, keep_originals=keep_originals, threads=threads)

    def _use_decode_attention(self, threads: int | None) -> None:
        """Where the kernels' threads do not start (experts may run on another backend), a remark says so."""
        from cpu_kernels import ThreadingError
        from hybrimoe.dense.attention import use_decode_attention

        try:
            self.attention = use_decode_attention(self.model, threads)
        except ThreadingError as error:
            self._application.remarks.append(f"attention stays with torch: {error}")

    def device_of(self, path: str) -> torch.device | None:
        """Device that the rules give the module at `path`; None where they do not say."""
        return self._application.placements.device_of(path)

    def stats(self) -> SessionStats:
        """Hits, misses, transfers, prefetches, bytes and us per lane: per layer and in total."""
        return self.session.stats()

    def explain(self) -> Explanation:
        """Which rule is for which module, with its operator, device (which of several accelerators) and bytes."""
        experts = self.resolution.experts
        units = self.session.units if len(self.session.units) > 1 else ()
        places = {
            experts[layer].path: f"accelerator {unit.index} ({unit.accelerator.name})"
            for unit in units
            for layer in unit.layers
        }
        dtype = self.config.cpu.expert_dtype
        return explain_resolution(self.model, self.resolution, dtype, self.remarks, places)

    def restore(self) -> None:
        """Make the model exactly what it was: the same modules and weights, no wrappers. A second call does nothing.

        Experts that were loaded straight into the store are written back into the module from it, and the model is on
        the CPU then; raises ModelError where the store holds them as int8 or int4, which is not what the checkpoint
        holds, and where dense layers were loaded as int8 or int4.
        """
        if not self._active:
            return
        if self.dense is not None and not self.dense.reversible:
            raise ModelError(
                f"the dense layers were loaded as {self.config.cpu.dense_dtype} (cpu.dense_dtype), from which the"
                " model's weights cannot be had back; load with another dense_dtype, or load the model again with"
                " transformers"
            )
        self._rebuild_deferred()
        if self.dense is not None:
            self.dense.undo()
        if self.attention is not None:
            self.attention.undo()
        self._application.undo()
        self.session.close()
        if self.model.__dict__.get(MARK) is self:
            del self.model.__dict__[MARK], self.model.__dict__[SAVE]
        self._active = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Injection:
        """A copy of an injected model shares the session, which owns threads and device memory."""
        return self

    def __enter__(self) -> Injection:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _without_accelerator(self) -> tuple[str, ...]:
        """Remarks on rules that want an accelerator where the session has no slots (known once it has started)."""
        session = self.session
        if session.accelerators and (session.n_slots or not session.started):
            return ()
        rules = dict.fromkeys(
            hit.rule.where()
            for hit in self.resolution.experts
            if hit.rule.operator is not None and hit.rule.operator.placement == "accelerator"
        )
        return tuple(f"{rule}: no accelerator slots here, the CPU computes these experts" for rule in rules)

    @property
    def deferred(self) -> list[tuple[int, nn.Module]]:
        """Layer indices and modules of the experts that had no weights when they were injected."""
        experts = enumerate(self.resolution.experts)
        return [(layer, hit.module) for layer, hit in experts if hit.layout is not None and hit.layout.is_meta]

    def _rebuild_deferred(self) -> None:
        deferred = self.deferred
        if not deferred:
            return
        from hybrimoe.dense.place import move
        from hybrimoe.injection.restore import rebuild_experts

        for layer, module in deferred:
            rebuild_experts(module, self.session.store, layer)
        move(self.model, torch.device("cpu"))  # where the experts are now: whole models fit host memory, not a GPU
