"""`Injection`: the handle of a model with hybrid experts; its counters, its explanation, and the way back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hybrimoe.amounts import size_text
from hybrimoe.config.deploy import DeployConfig
from hybrimoe.dense.card_attention import CardAttention
from hybrimoe.dense.prompts import WidePrompts
from hybrimoe.dense.threads import FewThreads
from hybrimoe.errors import ModelError
from hybrimoe.injection.application import Application
from hybrimoe.injection.explain import Explanation, explain_resolution
from hybrimoe.injection.guards import MARK, remove_guards
from hybrimoe.injection.resolve import Resolution
from hybrimoe.machine.disks import calibrated_disk, disk_text

if TYPE_CHECKING:
    from hybrimoe.dense.attention import DecodeAttention
    from hybrimoe.dense.linear import PackedDense
    from hybrimoe.dense.records import DenseRecords
    from hybrimoe.runtime.layer_call.stats import SessionStats
    from hybrimoe.runtime.session import Session
    from hybrimoe.step.build import StepWay
    from hybrimoe.step.model_step import ModelStep


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
        self.torch_threads: FewThreads | None = None
        self.prompts: WidePrompts | None = None
        self.card_attention: CardAttention | None = None
        self.lost_experts: RemovableHandle | None = None
        """The hook that ends a call of the model whose experts were lost meanwhile."""
        self.way: StepWay | None = None
        self.packing: str | None = None
        """Of a loaded model whose file has its experts quantised: what they became, and why."""
        self._application = application
        self._active = True
        self._sharing: weakref.WeakSet[Injection] = weakref.WeakSet([self])
        """This injection and those of copies of the model: the last one closes the session."""

    @property
    def active(self) -> bool:
        """False after `restore`."""
        return self._active

    @property
    def remarks(self) -> tuple[str, ...]:
        """What of the rules has no effect here, and why; and what experts of a quantised file became."""
        packing = () if self.packing is None else (self.packing,)
        remarks = (*self._application.remarks, *self._without_accelerator(), *packing)
        return (*remarks, *self._stored_keys(), *self._from_disk())

    def prepare_dense(self, *, keep_originals: bool, records: DenseRecords | None = None) -> None:
        """What the deployment's `cpu` section says of all that is not experts: their dtype, attention, torch.

        keep_originals: hold on to packed layers for `restore`. records: linear layers that are packed already.
        Raises CheckpointError where a weight is not finite.
        """
        cpu = self.config.cpu
        threads = cpu.threads if isinstance(cpu.threads, int) else None
        if cpu.attention == "auto":
            self._use_decode_attention(threads)
        dtype = cpu.dense_dtype
        if dtype == "int8" or dtype == "int4":
            from hybrimoe.dense.linear import pack_linears

            sizes = frozenset(hit.layout.num_experts for hit in self.resolution.experts if hit.layout is not None)
            self.dense = pack_linears(
                self.model, sizes, dtype, keep_originals=keep_originals, threads=threads, records=records
            )
        self.lost_experts = self.model.register_forward_hook(_LostExperts(self.session))
        self.torch_threads = FewThreads(self.model)
        self.prompts = WidePrompts(self.model)
        self.card_attention = CardAttention(self.model)

    def compile_step(self) -> None:
        """Decode steps in one compiled call, where the deployment wants that and the model is understood.

        The session must have started: the model runs a short prompt, which its compiled form is compared with.
        Raises ConfigError where `memory.kv_dtype` stores keys and values as no step of this model reads them.
        """
        from hybrimoe.generation.stored import kv_dtype_of
        from hybrimoe.step.build import StepWay, compile_step, require_readable

        if self.config.cpu.step == "transformers":
            self.way = StepWay(reason="cpu.step: transformers")
        else:
            self.way = compile_step(self.model, self.session)
        name = kv_dtype_of(self.model)
        if name != "auto":
            require_readable(self.model, self.way, name)

    @contextmanager
    def without_step(self) -> Iterator[None]:
        """Within the block the model's weights may be replaced: its compiled step is taken away and made anew."""
        if self.way is None or self.way.step is None:
            yield
            return
        self.way.undo()
        try:
            yield
        finally:
            self.compile_step()

    @property
    def step(self) -> ModelStep | None:
        """The decode step, compiled or captured, of the whole model or of pieces of it; None where transformers'
        forward runs all (`way.reason` says why)."""
        return None if self.way is None else self.way.step

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
        stats = self.session.stats()
        return stats if self.attention is None else replace(stats, attention_calls=self.attention.calls())

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """`model.state_dict()` with every weight, dequantised where only packed ones are left.

        Weights that were packed as int8 or int4 come back rounded, and take their whole size in memory. Raises
        ModelError where a lossy policy has given some of the experts up.
        """
        from hybrimoe.dense.linear import PackedLinear
        from hybrimoe.experts.module import HybridExperts

        state: dict[str, torch.Tensor] = self.model.state_dict()
        for path, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, HybridExperts | PackedLinear):
                state |= {f"{path}.{name}": weight for name, weight in module.full_weights().items()}
        return state

    def _stored_keys(self) -> tuple[str, ...]:
        """What a token's keys and values take, where they are stored in another dtype than the model's."""
        from hybrimoe.generation.kv_memory import stored_bytes
        from hybrimoe.generation.stored import StoredLayer, kv_dtype_of, new_cache

        if (name := kv_dtype_of(self.model)) == "auto":
            return ()
        stored = [layer for layer in new_cache(self.model).layers if isinstance(layer, StoredLayer)]
        own = len(stored) * stored_bytes(self.model.config.get_text_config(decoder=True), name)  # type: ignore[union-attr, operator]
        return (f"keys and values are stored as {name} in {len(stored)} layers, {own} bytes a token (memory.kv_dtype)",)

    def _from_disk(self) -> tuple[str, ...]:
        """Where experts are read from, if host memory does not hold them all."""
        from hybrimoe.generation.kv_memory import chunk_tokens

        tier = self.session.stats().tier
        if tier is None:
            return ()
        how = "past the page cache" if tier.direct else "through the page cache"
        disk = calibrated_disk(Path(tier.path))
        measured = f"; measured: {disk_text(disk)}" if disk is not None else "; hybrimoe calibrate measures this disk"
        return (
            f"{tier.n_slots} of {tier.n_records} experts fit host memory (memory.host,"
            f" {size_text(tier.n_slots * tier.slot_bytes)}); the others are read from {tier.path}, {how}{measured}",
            f"prompts go through in parts of up to {chunk_tokens(self.model)} tokens (what free memory has room for),"
            " each of which reads an expert at most once",
        )

    def explain(self) -> Explanation:
        """Which rule is for which module, with its operator, device (which of several accelerators) and bytes, how
        decode steps run, and what each accelerator's memory is for."""
        experts = self.resolution.experts
        units = self.session.units if len(self.session.units) > 1 else ()
        places = {
            experts[layer].path: f"accelerator {unit.index} ({unit.accelerator.name})"
            for unit in units
            for layer in unit.layers
        }
        dtype = self.session.config.expert_dtype
        explanation = explain_resolution(self.model, self.resolution, dtype, self.remarks, places)
        explanation = replace(explanation, memory=self._memory())
        return explanation if self.way is None else replace(explanation, ways=self.way.described())

    def _memory(self) -> dict[str, dict[str, int]]:
        """As `Explanation.memory`, of the session as it is."""
        accelerators, planned = self.session.accelerators, self.session.planned_memory()
        names = [
            f"{index}: {device.name}" if len(accelerators) > 1 else device.name
            for index, device in enumerate(accelerators)
        ]
        return {
            **{name: asdict(parts) for name, parts in zip(names, planned, strict=True)},
            "host": {"experts": self.session.stats().store_bytes},
        }

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
        self.take_out()

    def take_out(self) -> None:
        """Everything of the injection out of the model, but for weights that were never in it (`restore` writes them
        back first); the last injection of a session closes it."""
        if self.way is not None:
            self.way.undo()
        if self.dense is not None:
            self.dense.undo()
        if self.attention is not None:
            self.attention.undo()
        if self.lost_experts is not None:
            self.lost_experts.remove()
        if self.torch_threads is not None:
            self.torch_threads.undo()
        if self.prompts is not None:
            self.prompts.undo()
        if self.card_attention is not None:
            self.card_attention.undo()
        self._application.undo()
        self.session.release(self.model)
        self._sharing.discard(self)
        if not self._sharing:
            self.session.close()
        if self.model.__dict__.get(MARK) is self:
            del self.model.__dict__[MARK]
            remove_guards(self.model)
        self._active = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Injection:
        """The injection of a copied model: it shares the session, and each is restored without the other.

        Raises ModelError where rules have placed modules on devices.
        """
        model = copy.deepcopy(self.model, memo)
        if id(self) in memo:  # copying the model has copied it
            twin: Injection = memo[id(self)]
            return twin
        twin = Injection(model, self.config, self.resolution, self._application.copied(memo))
        parts = (self.dense, self.attention, self.torch_threads, self.prompts, self.card_attention, self.lost_experts)
        twin.dense, twin.attention, twin.torch_threads, twin.prompts, twin.card_attention, twin.lost_experts = (
            copy.deepcopy(parts, memo)
        )
        twin._active, twin._sharing = self._active, self._sharing
        twin._sharing.add(twin)
        if self.way is not None:
            twin.way = self.way.of_copy()
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """A session cannot be written to a file."""
        _refuse_pickling()

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
        return [
            (layer, module)
            for layer, module in enumerate(self.originals.values())
            if any(weight.is_meta for weight in module.parameters(recurse=False))
        ]

    def _rebuild_deferred(self) -> None:
        deferred = self.deferred
        if not deferred:
            return
        from hybrimoe.dense.place import move
        from hybrimoe.injection.restore import rebuild_experts

        self.session.bring_back()
        for layer, module in deferred:
            rebuild_experts(module, self.session.store, layer)
        move(self.model, torch.device("cpu"))  # where the experts are now: whole models fit host memory, not a GPU


def _refuse_pickling() -> NoReturn:
    raise ModelError(f"an injected model cannot be pickled: call model.{MARK}.restore() first")


class _LostExperts:
    """A hook that ends each call of a model with CheckpointError where bytes of experts that it may have used are lost.
    Copies of the model have the same experts."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._session.store.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> _LostExperts:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_pickling()
