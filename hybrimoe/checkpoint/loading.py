"""`load`: configuration -> model on the meta device -> inject -> dense weights -> experts, one by one, into the store.

At no time is there a second copy of a weight: what is in memory is the packed store, the dense weights, and the one
expert (or, for the few fused checkpoints whose conversion mixes experts, the one layer) or linear layer that is being
packed. What a later start finds packed on disk it does not read from the checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from cpu_kernels.jit.cache_dir import ENV_CACHE
from hybrimoe import compat
from hybrimoe.amounts import Amount, size_text
from hybrimoe.checkpoint.adapters.file import open_adapter
from hybrimoe.checkpoint.adapters.merging import Merged, merge_adapters
from hybrimoe.checkpoint.choice import ExpertChoice, choose_expert_dtype, wanted_dtype
from hybrimoe.checkpoint.conversion import Conversion, ConversionPlan, ModelShapes
from hybrimoe.checkpoint.dense import (
    complete,
    dense_dtype,
    load_dense,
    meta_model,
    read_config,
    read_generation_defaults,
    strict_dtypes,
)
from hybrimoe.checkpoint.errors import PackedFileWarning, TiedEmbeddingsWarning
from hybrimoe.checkpoint.experts import LayerSource, layer_sources, pack_experts
from hybrimoe.checkpoint.pack import dense as packed_dense
from hybrimoe.checkpoint.pack import experts as packed
from hybrimoe.checkpoint.pack.dense import DenseSource
from hybrimoe.checkpoint.pack.experts import PackedFile
from hybrimoe.checkpoint.pack.record_file import Header, folders, other_folders
from hybrimoe.checkpoint.progress import Progress, progress_of
from hybrimoe.checkpoint.rope import check_stretched, forget_longer_texts, stretch
from hybrimoe.checkpoint.source import is_demo, model_path, read_config_dict
from hybrimoe.checkpoint.weights import Weights, open_weights
from hybrimoe.config.deploy import DeployConfig, load_config
from hybrimoe.config.runtime import choose_accelerators
from hybrimoe.dense.place import dense_device, place_dense
from hybrimoe.dense.records import DenseRecords
from hybrimoe.errors import BudgetError, CheckpointError, ModelError
from hybrimoe.experts.layout import ExpertsLayout, find_experts, read
from hybrimoe.experts.towers import in_tower, remove_towers, tower_paths
from hybrimoe.machine.memory import available_bytes, total_bytes
from hybrimoe.runtime.learnt import RoutingFile
from hybrimoe.runtime.startup.backends import require_devices
from hybrimoe.runtime.store import ExpertStore, LayerSpec
from hybrimoe.runtime.tier.slots import RecordPlaces

if TYPE_CHECKING:
    from hybrimoe.injection import Injection
    from hybrimoe.runtime.session import Session


AUTO_SHARE = 0.75
"""Of the memory that is available before dense layers are packed: what `memory.host: auto` gives to experts. The rest
is for those layers, keys and values, and other programs."""


def load(
    path_or_hub_id: str | Path | None = None,
    config: str | Path | Mapping[str, Any] | DeployConfig | None = None,
    *,
    progress: Progress | bool | None = None,
    packed_file: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Loads a mixture-of-experts model with its experts in a hybrid runtime; `model.hybrimoe` is the `Injection`.

    path_or_hub_id: a model directory, a GGUF file or a hub id; None takes the deployment's `model`, and without one the
        demo model.
    config: deployment configuration (file, preset name, mapping or `DeployConfig`); `overrides` go over it
        (`accelerator`, `gpu_expert_slots`, `expert_dtype`, `policy`, `rules`, ... as in `hybrimoe.load_config`;
        `unknown_keys="ignore"` leaves out weights of the checkpoint that the model does not have;
        `rope_scaling="yarn", rope_factor=4` stretches its context;
        `vision="none"` leaves out the part that sees images; `adapters=["lora", "style:0.5"]` merges PEFT adapters into
        the weights while these are read).
    progress: called with (bytes done, bytes in total, what); True draws a bar on stderr, False does not, None does
        where stderr is a terminal.
    packed_file: keep packed experts and packed dense layers beside the model (or in the cache directory where that
        cannot be written: $HYBRIMOE_CACHE, else ~/.cache/hybrimoe). The next start maps the experts (reads them, where
        an accelerator copies from page-locked memory) and reads the dense layers.

    Raises ModelError (no model, a dense model), CheckpointError (shards, shapes, dtypes, values, keys), BudgetError
    (the experts do not fit host memory), and what `hybrimoe.inject` raises. Warns with PackedFileWarning where the
    packed file cannot be written; the model is loaded all the same.
    """
    deployment = load_config(config, model=None if path_or_hub_id is None else str(path_or_hub_id), **overrides)
    loader = Loader.open(deployment, packed_file=packed_file)
    with progress_of(progress) as show:
        return loader.load(show)


@dataclass(frozen=True, slots=True)
class Parts:
    """A model's weights by when they are read. early: dense ones that stay as they are. linears: linear layers that are
    packed. later: keys of the experts and of packed layers, which stay on the meta device at first."""

    early: list[Conversion]
    linears: DenseSource
    later: frozenset[str]


@dataclass(slots=True)
class Loader:
    """One loading: the opened checkpoint, the model without storage, and how the one becomes the other."""

    deployment: DeployConfig
    weights: Weights
    model: PreTrainedModel
    plan: ConversionPlan
    shapes: ModelShapes
    layouts: dict[str, ExpertsLayout]
    sources: list[LayerSource]
    choice: ExpertChoice
    places: tuple[Path, ...]
    merged: Merged

    @classmethod
    def open(cls, deployment: DeployConfig, *, packed_file: bool) -> Loader:
        """Reads the configuration and the headers of the checkpoint; no weights yet."""
        require_devices(choose_accelerators(deployment.accelerator))
        path = model_path(deployment.model)
        raw_config = read_config_dict(path)
        adapters = [open_adapter(name) for name in deployment.adapters]
        weights = open_weights(path, raw_config)
        if weights.pack is not None and deployment.cpu.dense_dtype == "auto":
            deployment = deployment.with_dtypes(dense=weights.pack.dense_dtype)
        hf_config = read_config(path)
        stretch(hf_config, deployment.rope)
        sees = compat.has_processor(path)
        model = meta_model(hf_config, dense_dtype(deployment.cpu.dense_dtype, hf_config), whole=sees)
        if not find_experts(model):
            raise ModelError(f"{path} is a dense model ({hf_config.model_type}): it has no experts to place")
        check_stretched(model, deployment.rope)
        plan = weights.plan(model)
        if deployment.vision == "none" or (weights.as_named and not has_towers(model, plan)):
            plan = without_towers(model, plan)
        layouts = {path: read(module) for path, module in find_experts(model)}
        tie_where_unsaid(model, raw_config, plan.conversions)
        merged = merge_adapters(model, plan, adapters)
        read_generation_defaults(model, path)
        shapes = ModelShapes(model.config, {name: tensor.shape for name, tensor in model.state_dict().items()})
        beside = weights.pack is None and not is_demo(path)  # nothing is ever added to a pack
        places = folders(path, beside=beside) if packed_file else ()
        sources = layer_sources(layouts, plan.conversions)
        choice = choose_expert_dtype(wanted_dtype(deployment.cpu.expert_dtype), sources)
        deployment = deployment.with_dtypes(expert=choice.dtype)
        return cls(deployment, weights, model, plan, shapes, layouts, sources, choice, places, merged)

    def load(self, show: Progress) -> PreTrainedModel:
        """Injects the model, then fills it. Where something fails the session is closed before the error goes on."""
        from hybrimoe.injection.inject import place_operators

        self.check_budget()
        dtypes = strict_dtypes(self.model, next(self.model.parameters()).dtype)
        sources, parts = self.sources, self.parts()
        loaded = load_dense(self.model, parts.early, self.shapes, dtypes)
        complete(self.model, loaded, parts.later, self.plan, unknown_keys=self.deployment.unknown_keys)
        forget_longer_texts(self.model)
        injection = place_operators(self.model, self.deployment)
        session = injection.session
        injection.packing = self.choice.remark
        try:
            place_dense(self.model, self.deployment)  # before the session measures what memory is left for slots
            session.keep_routing(
                RoutingFile(packed.file_name(self._experts_header(session.layer_specs())), self.places)
            )
            session.finalize(store=self._packed_store(session, sources, show))
            self._load_unreplaced(injection, sources, dtypes)
            records = self._dense_records(self._load_moved(injection, parts.linears, dtypes), dtypes, show)
            injection.prepare_dense(keep_originals=False, records=records)
            if not session.started:
                self._pack(session.store, sources, show)
                session.start()
            injection.compile_step()
        except BaseException:
            session.close()
            raise
        return self.model

    def check_budget(self) -> None:
        """Raises BudgetError, before anything is read, where `memory.host` is too small to run experts from disk."""
        memory, dtype = self.deployment.memory, self.deployment.cpu.expert_dtype
        if memory.disk.kind != "none" and memory.host.kind != "auto" and dtype != "auto":
            layers = [LayerSpec(path, layout.spec(dtype), layout.num_experts) for path, layout in self.layouts.items()]
            RecordPlaces.of(Path(), layers, 0).slots_for(host_budget(memory.host, layers))

    def parts(self) -> Parts:
        """Which weights are read when."""
        experts = {f"{source.path}.{name}" for source in self.sources for name in source.parameters}
        dense = [conversion for conversion in self.plan.conversions.values() if experts.isdisjoint(conversion.targets)]
        linears = self._linears_to_pack()
        early = [conversion for conversion in dense if linears.late.keys().isdisjoint(conversion.targets)]
        return Parts(early, linears, frozenset(experts | linears.late.keys()))

    @property
    def shelves(self) -> tuple[Path, ...]:
        """Where packed files may lie: in the model's own folder if it is a pack, in `places`, and, where the model was
        moved, in other folders of the cache."""
        own = () if self.weights.pack is None or self.weights.folder is None else (self.weights.folder,)
        return (*own, *self.places, *(other_folders(self.places) if self.places else ()))

    def _packed_store(self, session: Session, sources: list[LayerSource], show: Progress) -> ExpertStore | None:
        """The session's experts as they lie packed on disk, or are packed there now; None where they go to memory.

        Raises BudgetError where they do not fit the memory or the disk that the deployment allows.
        """
        layers, memory = session.layer_specs(), self.deployment.memory
        n_bytes, num_experts = (sum(getattr(layer, name) for layer in layers) for name in ("nbytes", "num_experts"))
        file = packed.find(self.shelves, layers, self._experts_header(layers))
        if memory.disk.kind != "none":
            if file is None:
                check_disk(memory.disk, n_bytes)
                file = self._pack_on_disk(layers, sources, show)
            return self._from_disk(file, session)
        if file is not None and not session.needs_pinned_host:
            return file.open()
        check_host_memory(memory.host, n_bytes, num_experts)  # a mapping is no page-locked memory
        return None if file is None else file.read(lambda done: show(done, n_bytes, "reading packed experts"))

    def _from_disk(self, file: PackedFile, session: Session) -> ExpertStore:
        """The packed experts, of which host memory holds as many as `memory.host` allows; mapped where that is all.

        Raises BudgetError where it is too little, or where a lossy policy needs them all.
        """
        budget_bytes = host_budget(self.deployment.memory.host, file.layers)
        n_bytes = sum(layer.nbytes for layer in file.layers)
        if budget_bytes >= n_bytes:
            return file.open()
        if session.config.lossy is not None:
            raise BudgetError(
                f"a lossy policy ({session.config.lossy.name}) needs all experts in host memory:"
                f" {size_text(n_bytes)}, memory.host allows {size_text(budget_bytes)}; leave scheduler.lossy out"
            )
        return file.tiered(budget_bytes, self.places, pinned=session.needs_pinned_host)

    def _linears_to_pack(self) -> DenseSource:
        """The linear layers that `cpu.dense_dtype` packs; none where the dense part goes to an accelerator as a
        whole."""
        dtype, entries = self.deployment.cpu.dense_dtype, []
        if (dtype == "int8" or dtype == "int4") and dense_device(self.deployment) is None:
            from hybrimoe.dense.linear import linear_entries

            sizes = frozenset(layout.num_experts for layout in self.layouts.values())
            entries = linear_entries(self.model, sizes, dtype)
        return DenseSource.of(self.model, entries, self.plan.conversions)

    def _load_moved(self, injection: Injection, linears: DenseSource, dtypes: dict[str, Any]) -> DenseSource:
        """Reads linear layers as they are where rules have placed them on a device; returns the others."""
        moved = {}
        for entry in linears.entries:
            device = injection.device_of(entry.path)
            if (device is not None and device.type != "cpu") or "forward" in vars(self.model.get_submodule(entry.path)):
                moved[entry.path] = device
                if conversion := linears.late.get(entry.weight_key):
                    load_dense(self.model, [conversion], self.shapes, dtypes, device, {entry.weight_key})
        return linears.without(moved)

    def _load_unreplaced(self, injection: Injection, sources: list[LayerSource], dtypes: dict[str, Any]) -> None:
        """Reads experts whole where the rules leave the model's own module in place."""
        for source in (source for source in sources if source.path not in injection.originals):
            keys = {f"{source.path}.{name}" for name in source.parameters}
            device = injection.device_of(source.path) or next(self.model.get_input_embeddings().parameters()).device
            load_dense(self.model, source.parameters.values(), self.shapes, dtypes, device, keys)

    def _dense_records(self, linears: DenseSource, dtypes: dict[str, Any], show: Progress) -> DenseRecords | None:
        """The packed linear layers: read from their file, or packed from the checkpoint and kept in a file."""
        if not linears.entries:
            return None
        adapters = self.merged.stamps(entry.weight_key for entry in linears.entries)
        header = packed_dense.describe(linears, self.weights.stamps(linears.stored_keys()), adapters)
        records = packed_dense.read(self.shelves, linears, header, show)
        if records is None:
            records = linears.pack(self.model, self.shapes, dtypes, show)
            self._keep(
                "dense layers", records.nbytes, show, lambda place: packed_dense.write(place, linears, records, header)
            )
        return records

    def _experts_header(self, layers: Sequence[LayerSpec]) -> Header:
        """What a packed file must say of itself to hold these experts, as the adapters leave them."""
        parameters = (f"{source.path}.{name}" for source in self.sources for name in source.parameters)
        return packed.describe(layers, self.weights.stamps(()), self.merged.stamps(parameters))

    def _pack(self, store: ExpertStore, sources: list[LayerSource], show: Progress) -> None:
        pack_experts(store, sources, self.shapes, show)
        header = self._experts_header(store.layers)
        self._keep("experts", store.nbytes, show, lambda place: packed.write(place, store.buffer, header))

    def _pack_on_disk(self, layers: tuple[LayerSpec, ...], sources: list[LayerSource], show: Progress) -> PackedFile:
        """Packs straight into a packed file: experts that do not fit host memory."""
        header = self._experts_header(layers)
        problems: list[str] = []
        for place in self.places:
            try:
                with packed.fill(place, layers, header) as store:
                    pack_experts(store, sources, self.shapes, show)
            except OSError as error:
                problems.append(f"{place}: {error.strerror or error}")
                continue
            if file := packed.find((place,), layers, header):
                return file
            problems.append(f"{place}: what was just written cannot be read back; check the disk")
        raise CheckpointError(
            f"memory.disk: the packed experts need {sum(layer.nbytes for layer in layers) / 2**30:.2f} GiB on disk:"
            f" {'; '.join(problems) or 'packed_file=False leaves no place for them'};"
            f" set ${ENV_CACHE} to a directory with room"
        )

    def _keep(self, what: str, n_bytes: int, show: Progress, write: Callable[[Path], object]) -> None:
        """Writes a packed file to the first place that takes it; none taking it is a warning."""
        if not self.places:
            return
        problems: list[str] = []
        show(0, n_bytes, f"writing packed {what}")
        for place in self.places:
            try:
                write(place)
            except OSError as error:
                problems.append(f"{place}: {error.strerror or error}")
                continue
            show(n_bytes, n_bytes, f"writing packed {what}")
            return
        warnings.warn(
            PackedFileWarning(
                f"the packed {what} ({n_bytes / 2**20:.0f} MiB) could not be kept for the next start:"
                f" {'; '.join(problems)}; set ${ENV_CACHE} to a directory with room,"
                " or pass packed_file=False"
            ),
            stacklevel=2,
        )


def has_towers(model: PreTrainedModel, plan: ConversionPlan) -> bool:
    """Whether a checkpoint has weights for the parts of a model that text does not go through."""
    towers = tower_paths(model)
    return any(in_tower(key, towers) for key in plan.conversions)


def without_towers(model: PreTrainedModel, plan: ConversionPlan) -> ConversionPlan:
    """Takes those parts out of a model (on the meta device); returns the plan for the others."""
    towers = remove_towers(model)
    kept = {
        key: conversion
        for key, conversion in plan.conversions.items()
        if not all(in_tower(target, towers) for target in conversion.targets)
    }
    return replace(plan, conversions=kept)


def host_budget(host: Amount, layers: Sequence[LayerSpec]) -> int:
    """Bytes of host memory that `host` allows for experts ("auto": AUTO_SHARE of what is available now)."""
    match host.kind:
        case "bytes":
            return int(host.value)
        case "share":
            return int(host.value * total_bytes())
        case "count":
            return int(host.value) * RecordPlaces.of(Path(), layers, 0).slot_bytes
        case _:
            return int(AUTO_SHARE * available_bytes())


def check_host_memory(host: Amount, needed_bytes: int, num_experts: int) -> None:
    """Raises BudgetError where `num_experts` of `needed_bytes` together are more than `host` allows ("auto": than what
    is available)."""
    match host.kind:
        case "bytes":
            allowed, what = int(host.value), "memory.host allows"
        case "share":
            allowed, what = int(host.value * total_bytes()), f"memory.host allows {host} of all memory,"
        case "count":
            allowed, what = int(host.value * needed_bytes / num_experts), f"memory.host allows {host} experts,"
        case _:
            allowed, what = available_bytes(), "this machine has free"
    if needed_bytes > allowed:
        raise BudgetError(
            f"the packed experts need {needed_bytes / 2**30:.2f} GiB of host memory, {what} {allowed / 2**30:.2f} GiB;"
            " choose a smaller expert_dtype (int8 to int2), or let them stay on disk (memory.disk: auto)"
        )


def check_disk(disk: Amount, needed_bytes: int) -> None:
    """Raises BudgetError where a packed file of `needed_bytes` is more than a size given for `disk` allows."""
    if disk.kind == "bytes" and needed_bytes > disk.value:
        raise BudgetError(
            f"the packed experts need {needed_bytes / 2**30:.2f} GiB, memory.disk allows {disk.value / 2**30:.2f} GiB;"
            " choose a smaller expert_dtype (int8 to int2)"
        )


def tie_where_unsaid(model: PreTrainedModel, config: Mapping[str, Any], stored: Container[str]) -> None:
    """Ties the output layer of `model` (on the meta device) to the embeddings where only the checkpoint tells that.

    What config.json (`config`, as it is) says holds. Where it says nothing, a family's own default decides (Gemma ties,
    Mixtral does not); and where a family does not tie and the checkpoint has no output layer, it can only be the input
    embeddings: a TiedEmbeddingsWarning says so. stored: the parameters that the checkpoint has weights for.
    """
    tie = None if _says_tied(config) else compat.output_tie(model)
    if tie is None:
        return
    output, embeddings = tie
    if output in stored or embeddings not in stored:
        return
    compat.tie_output(model)
    warnings.warn(
        TiedEmbeddingsWarning(
            "config.json does not say whether the embeddings are tied (tie_word_embeddings), and the checkpoint has no"
            f" {output}: the output layer is taken to be {embeddings}"
        ),
        stacklevel=2,
    )


def _says_tied(config: Mapping[str, Any]) -> bool:
    """Whether config.json, or a part of it, says of the embeddings whether they are tied."""
    parts = (part for part in config.values() if isinstance(part, Mapping))
    return "tie_word_embeddings" in config or any(map(_says_tied, parts))
