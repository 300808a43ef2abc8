"""`inject` puts the operators of the rules into a model; the `Injection` it returns takes them out again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import nn

from hybrimoe.config.deploy import DeployConfig, load_config
from hybrimoe.dense.devices import Placements, device_is_here, require_device
from hybrimoe.errors import ConfigError, HybriMoEError, ModelError, unknown
from hybrimoe.experts.absent import AbsentWeights, explanation
from hybrimoe.injection.explain import Explanation, explain_resolution
from hybrimoe.injection.operators import DefaultKwargs, ExpertsKwargs
from hybrimoe.injection.refusals import refuse_adapted_experts, refuse_second_injection, refuse_wrapped_experts
from hybrimoe.injection.resolve import Hit, Resolution, claimed_modules, resolve
from hybrimoe.injection.rules import RulesSource, read_rules

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrimoe.dense.attention import DecodeAttention
    from hybrimoe.dense.linear import PackedDense
    from hybrimoe.runtime.config import RuntimeConfig
    from hybrimoe.runtime.layer_call.stats import SessionStats
    from hybrimoe.runtime.session import Session
    from hybrimoe.runtime.store import ExpertStore, LayerSpec

MARK = "hybrimoe"
"""Attribute of an injected model that holds its Injection."""


SAVE = "save_pretrained"
"""Method that an injected model guards: weights that it holds only packed are refused before a file is written."""


class OpenStore(Protocol):
    """Gives the store of already packed experts for these layers, or None where there is none.

    pinned: whether an accelerator copies from page-locked memory.
    """

    def __call__(self, layers: tuple[LayerSpec, ...], pinned: bool, /) -> ExpertStore | None: ...


class Application:
    """What operators do to a model, kept so that it can be undone."""

    def __init__(self, model: nn.Module, session: Session, resolution: Resolution) -> None:
        self.session = session
        self.placements = Placements()
        self.originals: dict[str, nn.Module] = {}
        self.remarks: list[str] = list(resolution.remarks)
        self._sites = _sites_of(model)
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._claimed = claimed_modules(resolution.hits)

    def replace_experts(self, hit: Hit) -> None:
        """Put HybridExperts of the hit's placement where the experts module is."""
        operator, kwargs = hit.rule.operator, hit.rule.kwargs
        if operator is None or operator.placement is None or not isinstance(kwargs, ExpertsKwargs):
            raise ModelError(f"{hit.rule.where()}: this operator does not replace experts")
        hybrid = self.session.add_layer(hit.path, hit.module, operator.placement, kwargs.expert_dtype)
        self.originals[hit.path] = hit.module
        for parent, name in self._sites[id(hit.module)]:
            setattr(parent, name, hybrid)
            self._replaced.append((parent, name, hit.module))

    def place(self, hit: Hit) -> None:
        """Put the module on the device of the rule, if it names one."""
        kwargs = hit.rule.kwargs
        if not isinstance(kwargs, DefaultKwargs) or kwargs.device is None:
            return
        device = torch.device(kwargs.device)
        if kwargs.missing == "stay" and not device_is_here(device):
            self._remark_once(f"{hit.rule.where()}: {kwargs.device} is not here, the modules stay where they are")
            return
        require_device(device, f"{hit.rule.where()}: {hit.path}")
        self.placements.place(hit.path, hit.module, device, self._claimed)

    def undo(self) -> None:
        """Put every module and weight back; a second call does nothing."""
        while self._replaced:
            parent, name, original = self._replaced.pop()
            original.train(getattr(parent, name).training)
            setattr(parent, name, original)
        self.placements.undo()

    def copied(self, memo: dict[int, Any]) -> Application:
        """The same done to a copy of the model, whose modules are in `memo` (of `copy.deepcopy`)."""
        if self.placements.devices:
            raise ModelError(
                f"rules have placed modules on devices ({next(iter(self.placements.devices))}), which a copy of the"
                f" model would share with it: call model.{MARK}.restore() first, copy, and inject both"
            )
        twin = Application.__new__(Application)
        twin.session, twin.placements, twin.remarks = self.session, Placements(), list(self.remarks)
        twin.originals = copy.deepcopy(self.originals, memo)
        twin._replaced = copy.deepcopy(self._replaced, memo)
        twin._sites, twin._claimed = {}, frozenset()
        return twin

    def _remark_once(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)


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
        self._sharing: weakref.WeakSet[Injection] = weakref.WeakSet([self])
        """This injection and those of copies of the model: the last one closes the session."""

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
        stats = self.session.stats()
        return stats if self.attention is None else replace(stats, attention_calls=self.attention.calls())

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """`model.state_dict()` with every weight, dequantised where only packed ones are left.

        Weights that were packed as int8 or int4 come back rounded, and take their whole size in memory. Raises
        ModelError where a lossy policy keeps only some of the experts.
        """
        from hybrimoe.dense.linear import PackedLinear
        from hybrimoe.experts.module import HybridExperts

        state: dict[str, torch.Tensor] = self.model.state_dict()
        for path, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, HybridExperts | PackedLinear):
                state |= {f"{path}.{name}": weight for name, weight in module.full_weights().items()}
        return state

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
        self.session.release(self.model)
        self._sharing.discard(self)
        if not self._sharing:
            self.session.close()
        if self.model.__dict__.get(MARK) is self:
            del self.model.__dict__[MARK], self.model.__dict__[SAVE]
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
        twin.dense, twin.attention = copy.deepcopy((self.dense, self.attention), memo)
        twin._active, twin._sharing = self._active, self._sharing
        twin._sharing.add(twin)
        model.__dict__[SAVE] = SaveGuard(model)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """A session cannot be written to a file."""
        raise ModelError(f"an injected model cannot be pickled: call model.{MARK}.restore() first")

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
        experts = enumerate(self.originals.values())
        return [
            (layer, module) for layer, module in experts if any(p.is_meta for p in module.parameters(recurse=False))
        ]

    def _rebuild_deferred(self) -> None:
        deferred = self.deferred
        if not deferred:
            return
        from hybrimoe.dense.place import move
        from hybrimoe.injection.restore import rebuild_experts

        for layer, module in deferred:
            rebuild_experts(module, self.session.store, layer)
        move(self.model, torch.device("cpu"))  # where the experts are now: whole models fit host memory, not a GPU


def inject(
    model: nn.Module,
    rules: RulesSource | None = None,
    accelerator: str | Sequence[str] | None = None,
    gpu_expert_slots: int | float | str | None = None,
    expert_dtype: str | None = None,
    scheduler: Mapping[str, Any] | None = None,
    config: str | Path | Mapping[str, Any] | DeployConfig | None = None,
    *,
    store: OpenStore | None = None,
    frequencies: npt.NDArray[np.float64] | None = None,
    runtime: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Injection:
    """Replace the experts of a transformers model, as the rules say, by experts that CPU and accelerator share.

    rules: "auto", a shipped name, a file, or inline rules.
    accelerator: "cuda:0" or another torch device, "emulated", "none", "auto", or a list: each gets a block of layers.
    gpu_expert_slots: experts on the accelerator at a time, over all layers: a number, a share in (0, 1], "6GiB", auto.
    expert_dtype: "float32", "bfloat16", "int8" or "int4".
    scheduler: `{"policy": ...}` and parameters, as in the deployment file.
    config: deployment file, preset or mapping; what is given above goes over it. Without one, "auto" and bfloat16.
    store: gives packed experts for the layers, so that none are packed here (what `hybrimoe.load` uses).
    frequencies: activation counts [layers, experts] for the first fill of the slots.
    runtime: further fields of `hybrimoe.runtime.config.RuntimeConfig`, such as a profile.
    overrides: further keys of `hybrimoe.load_config`.

    A model on the meta device gets its weights later: the session starts when its store is filled.
    Raises RuleError, ConfigError, ModelError (dense, or injected already), UnsupportedExpertsError, DeviceError,
    BudgetError; the model is then as it was.
    """
    refuse_second_injection(model)
    deployment = load_config(
        {} if config is None else config,
        accelerator=accelerator if accelerator is None or isinstance(accelerator, str) else list(accelerator),
        gpu_expert_slots=gpu_expert_slots,
        expert_dtype=expert_dtype,
        scheduler=scheduler,
        **overrides,
    )
    refuse_adapted_experts(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    bound = read_rules(deployment.located_rules() if rules is None else rules, model_type)
    resolution = resolve(model, bound)
    refuse_wrapped_experts(model, [hit.path for hit in resolution.experts])
    session = _new_session(runtime_settings(deployment, runtime))
    application = Application(model, session, resolution)
    try:
        _apply(application, resolution)
        _finalize(model, session, store, frequencies)
    except BaseException:
        application.undo()
        session.close()
        raise
    injection = Injection(model, deployment, resolution, application)
    if not injection.deferred:
        injection.prepare_dense(keep_originals=True)
    model.__dict__[MARK] = injection
    model.__dict__[SAVE] = SaveGuard(model)
    return injection


def runtime_settings(deployment: DeployConfig, extra: Mapping[str, Any] | None) -> RuntimeConfig:
    """The session's settings: the deployment's, with `extra` fields on top. Raises ConfigError for unknown ones."""
    from hybrimoe.runtime.config import RuntimeConfig

    fields = RuntimeConfig.__dataclass_fields__
    for name in extra or {}:
        if name not in fields:
            raise ConfigError(unknown("runtime setting", name, fields))
    return replace(deployment.runtime(), **(extra or {}))


def _new_session(settings: RuntimeConfig) -> Session:
    from hybrimoe.runtime.session import Session

    return Session(settings)


def _apply(application: Application, resolution: Resolution) -> None:
    """Experts in the order of execution (their index is the layer's), then everything else in the model's order."""
    done = {hit.path for hit in resolution.experts}
    for hit in (*resolution.experts, *(hit for hit in resolution.hits if hit.path not in done)):
        if hit.rule.operator is None:
            continue
        try:
            hit.rule.operator.apply(application, hit)
        except HybriMoEError as error:
            error.add_note(f"while applying {hit.rule.where()} to {hit.path}")
            raise


def _finalize(
    model: nn.Module, session: Session, store: OpenStore | None, frequencies: npt.NDArray[np.float64] | None
) -> None:
    opened = None if store is None else partial(store, session.layer_specs())
    session.finalize(model, store=opened, frequencies=frequencies)


class SaveGuard:
    """Stands for `save_pretrained` of an injected model: saves what is whole, refuses what exists only packed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, state_dict: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> Any:
        """Saves as the model's class does. Raises ModelError before anything is written."""
        model: Any = self._model()
        if state_dict is None:
            state_dict = model.state_dict()
            absent = [value for value in state_dict.values() if isinstance(value, AbsentWeights)]
            if absent:
                raise ModelError(explanation(absent[0].origin))
        return type(model).save_pretrained(model, *args, state_dict=state_dict, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SaveGuard:
        """The copied injection gives the copied model its own."""
        return self


def _sites_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place (parent, name) at which each module hangs; a shared module hangs at several."""
    sites: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                sites.setdefault(id(child), []).append((parent, name))
    return sites
