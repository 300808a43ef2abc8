"""The deployment configuration: one YAML file, mapping or preset says what runs where (docs/config.md).

`load_config` reads it, checks every key against the models below (pydantic v2) and reports mistakes with file, line and
the nearest right name. `hybrimoe.config.runtime.runtime_config` turns it into what a runtime session needs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from hybrimoe.amounts import Amount, BytesAmount, DiskAmount, ExpertsAmount, HostAmount, SizeAmount
from hybrimoe.config.adapters import Adapters, resolved_adapters
from hybrimoe.config.errors import config_error, locate
from hybrimoe.config.scheduler import SchedulerConfig, check_scheduler
from hybrimoe.config.values import Accelerators, ModelName, Section, Threads, check_rules
from hybrimoe.errors import ConfigError, unknown
from yaml_rules import shipped
from yaml_rules.errors import YamlRulesError
from yaml_rules.located import KeyPath, Located, read_yaml

ExpertDtypeName = Literal["float32", "bfloat16", "int8", "int6", "int5", "int4", "int3", "int2"]
ExpertDtypeChoice = Literal["auto", "float32", "bfloat16", "int8", "int6", "int5", "int4", "int3", "int2"]
DenseDtypeName = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
UnknownKeys = Literal["error", "ignore"]
VisionName = Literal["auto", "none"]
KvDtypeName = Literal["auto", "float32", "bfloat16", "int8", "int4"]
DeviceWait = Annotated[float, Field(gt=0.0, le=86_400.0)] | Literal["auto", "none"]
BackendName = Literal["auto", "numba", "torch", "ipex", "onnx", "reference"]


class MemoryConfig(Section):
    """How much memory each tier may use."""

    gpu_experts: ExpertsAmount = Field(default=Amount("auto"), description="Expert slots on the accelerator.")
    host: HostAmount = Field(
        default=Amount("auto"),
        description="Host memory for experts; those that do not fit are read from disk, if `disk` allows it.",
    )
    disk: DiskAmount = Field(
        default=Amount("none"), description="auto: experts that `host` has no room for are read when needed."
    )
    host_copy: Literal["keep", "drop"] = Field(
        default="keep",
        description="drop: experts that a policy which never moves them (static) has put into slots leave host memory.",
    )
    kv: BytesAmount = Field(
        default=Amount("auto"),
        description="Memory for keys and values of replies under way, on the device that computes attention; expert "
        "slots leave it free.",
    )
    kv_dtype: KvDtypeName = Field(
        default="auto",
        description="How keys and values are stored; auto as the model computes them. Others are for models whose "
        "attention is compiled on the CPU.",
    )


class CpuConfig(Section):
    """The CPU lane and how weights are stored."""

    backend: BackendName = Field(
        default="auto", description="CPU kernels; auto takes the fastest that is measured to work."
    )
    threads: Threads = Field(default="auto", description="CPU threads; auto takes one per physical core.")
    expert_dtype: ExpertDtypeChoice = Field(
        default="auto", description="How experts are stored; auto: as suits a quantised file, else bfloat16."
    )
    dense_dtype: DenseDtypeName = Field(
        default="auto", description="How all other weights are stored; auto as in the model."
    )
    step: Literal["auto", "transformers"] = Field(
        default="auto", description="Decode steps: auto compiles them on the CPU, and captures them on a card."
    )
    attention: Literal["auto", "torch"] = Field(
        default="auto", description="Decode steps of bfloat16 attention on the CPU: auto is our kernel."
    )


class GenerationConfig(Section):
    """How replies are computed."""

    speculate: bool = Field(
        default=False, description="Drafts from the text itself, verified several tokens a step; the text is the same."
    )
    context_shift: bool = Field(
        default=False,
        description="Leave the oldest tokens out where a text outgrows the context; else a longer prompt is refused and"
        " a reply ends there.",
    )
    attention_sinks: int | None = Field(
        default=None, ge=0, le=65_536, description="With context_shift: first tokens that always stay (4)."
    )

    @model_validator(mode="after")
    def _sinks_of_shifts(self) -> GenerationConfig:
        if self.attention_sinks is not None and not self.context_shift:
            raise ValueError("attention_sinks are tokens that context_shift keeps: give that, too, or leave them out")
        return self


class RopeConfig(Section):
    """Rotary embeddings stretched to a longer context than the model was trained for."""

    scaling: Literal["none", "linear", "dynamic", "yarn"] = Field(
        description="How; none takes out what the model's configuration asks for."
    )
    factor: float | None = Field(
        default=None, ge=1.0, le=1024.0, allow_inf_nan=False, description="How many times as long the context becomes."
    )
    original_context: int | None = Field(
        default=None, ge=1, le=(1 << 31) - 1, description="Tokens that the model was trained for; else as it says."
    )

    @model_validator(mode="before")
    @classmethod
    def _names_scaling(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "scaling" not in given:
            raise ValueError("scaling is missing (--rope-scaling): none, linear, dynamic or yarn")
        return given

    @model_validator(mode="after")
    def _factor_of_scaling(self) -> RopeConfig:
        if self.scaling == "none" and self.factor is not None:
            raise ValueError("scaling none has no factor: leave that out, or choose linear, dynamic or yarn")
        if self.scaling != "none" and self.factor is None:
            raise ValueError(f"scaling {self.scaling} needs a factor (--rope-scale), as 2 for twice the context")
        return self


ModelsEntry = Annotated[str, Field(min_length=1)] | dict[str, Any]
ToolParser = Literal["hermes", "qwen3_coder", "glm", "mistral", "llama3", "deepseek", "harmony"]


class ServerConfig(Section):
    """Where `hybrimoe serve` listens, and what it keeps between requests."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=1, le=65535)
    name: str | None = Field(default=None, min_length=1, description="Name of the model in the API.")
    models: Annotated[str, Field(min_length=1)] | dict[str, ModelsEntry] | None = Field(
        default=None,
        description="Further models, loaded when a request names them: a folder of models, or their names with a model"
        " each, or with what their deployment has instead of this one's.",
    )
    idle_unload_seconds: float | None = Field(
        default=None, gt=0.0, le=31_536_000.0, description="Time without a request after which a model leaves memory."
    )
    prefix_cache: DiskAmount = Field(
        default=Amount("auto"),
        description="Host memory for what prompts and replies computed, for prompts that begin alike; auto: half of "
        "what is free beside the model and memory.kv.",
    )
    prefix_cache_disk: DiskAmount = Field(
        default=Amount("none"),
        description="Disk for what prefix_cache has no more room for, and for the next start: what was said in "
        "conversations, readable by their user alone; auto: a quarter of what is free.",
    )
    prefix_cache_folder: str | None = Field(
        default=None, min_length=1, description="Folder of prefix_cache_disk; by default prefixes in HYBRIMOE_CACHE."
    )
    slot_save_path: str | None = Field(
        default=None,
        min_length=1,
        description="Folder in which /slots saves what slots hold; what was said, readable by its user alone. Without "
        "it, slots are not saved.",
    )
    parallel: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        default="auto",
        description="Replies that are computed at once; auto: up to 4, as the memory for keys and values goes.",
    )
    queue_length: int = Field(
        default=32, ge=0, le=100_000, description="Requests that may wait; one more is refused with 429."
    )
    max_wait_seconds: float | None = Field(
        default=None, gt=0.0, le=86_400.0, description="A request that has waited so long gets 429; none: any time."
    )
    max_reply_seconds: float | None = Field(
        default=None,
        gt=0.0,
        le=86_400.0,
        description="A reply that is not complete so long after its request came ends with what there is.",
    )
    max_stall_ms: float = Field(
        default=500.0,
        gt=0.0,
        le=600_000.0,
        description="Longest part of a prompt between two tokens of the other replies, in ms of computing.",
    )
    api_key_file: str | None = Field(
        default=None, min_length=1, description="File with the API keys, one a line; without one none is asked for."
    )
    tls_cert_file: str | None = Field(
        default=None, min_length=1, description="Certificate (PEM, with the chain) for HTTPS; needs tls_key_file."
    )
    tls_key_file: str | None = Field(default=None, min_length=1, description="Private key (PEM) of tls_cert_file.")
    cors_origins: tuple[str, ...] = Field(
        default=(), description="Web pages that may call the server, as https://chat.example.org; * is all."
    )
    max_body: SizeAmount = Field(default=Amount("bytes", 8 << 20), description="Largest request that is read.")
    max_body_seconds: float = Field(
        default=60.0,
        gt=0.0,
        le=86_400.0,
        description="Time in which a request must be sent; slower ones get 408.",
    )
    drain_seconds: float = Field(
        default=30.0, ge=0.0, le=86_400.0, description="Time that replies under way have when the server is to end."
    )
    tool_parser: ToolParser | None = Field(
        default=None, description="Form in which the model calls tools; by default its chat template and tokens tell."
    )
    special_in_messages: bool = Field(
        default=False,
        description="Read the names of special tokens within messages as these tokens; else they are text, and no"
        " message can pretend to end.",
    )
    strict: bool = Field(
        default=False, description="Refuse requests with unknown fields, instead of leaving these out with a warning."
    )
    tracing: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = Field(
        default=None,
        description="Where OpenTelemetry traces of requests are sent (OTLP over HTTP), as"
        " http://127.0.0.1:4318/v1/traces; needs the extra otel.",
    )
    page: bool = Field(default=True, description="A page at / to chat and to see the model at work.")
    access_log: bool = Field(default=True, description="A line on stderr for each request, without contents.")


class DeployConfig(Section):
    """One deployment: the model, its rules, the memory of each tier, CPU, scheduler, replies and server."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="HybriMoE deployment")

    model: ModelName | None = Field(default=None, description="Model directory, GGUF file or hub id; omitted = demo.")
    adapters: Adapters = Field(
        default=(), description="Folders of PEFT adapters (LoRA) that are merged into the weights, as DIR or DIR:SCALE."
    )
    unknown_keys: UnknownKeys = Field(
        default="error", description="Weights of the checkpoint that the model does not have: error, or ignore them."
    )
    vision: VisionName = Field(
        default="auto",
        description="The part of a model that sees images: auto has it where the model has a processor; none leaves it"
        " out, for memory.",
    )
    rules: Annotated[Any, BeforeValidator(check_rules)] = Field(
        default="auto", description="Shipped name, file or inline list."
    )
    accelerator: Accelerators = Field(
        default=("auto",), description="Device, emulated, none or auto; a list: all of them, a block of layers each."
    )
    device_wait_seconds: DeviceWait = Field(
        default="auto",
        description="Longest time for which work of an accelerator is waited for before it counts as hanging; auto: far"
        " longer than it should take, 30 at least; none: any time.",
    )
    memory: MemoryConfig = MemoryConfig()
    cpu: CpuConfig = CpuConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    rope: RopeConfig | None = Field(
        default=None, description="Context beyond the model's own; by default positions are as the model has them."
    )
    generation: GenerationConfig = GenerationConfig()
    server: ServerConfig = ServerConfig()

    _located: Located = PrivateAttr(default_factory=lambda: Located({}))
    _given: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeployConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    @property
    def source(self) -> str:
        """File or preset that this configuration was read from."""
        return self._located.source

    def located_rules(self) -> Located | str:
        """The rules as a name or file, or inline with the lines on which they stand in the deployment file."""
        if isinstance(self.rules, str):
            return self.rules
        here = isinstance(self._located.data, Mapping) and self._located.data.get("rules") == self.rules
        return self._located.sub(("rules",)) if here else Located(self.rules, "<rules>")

    def check_scheduler(self) -> None:
        """Raises ConfigError where a policy, one of its parts or a parameter does not exist; names file and line."""
        check_scheduler(self.scheduler, self._located, self._given)

    def with_dtypes(self, *, expert: str | None = None, dense: str | None = None) -> DeployConfig:
        """The same deployment with other dtypes of `cpu`: where it says "auto", what that comes to."""
        given = {name: dtype for name, dtype in (("expert_dtype", expert), ("dense_dtype", dense)) if dtype is not None}
        changed = self.model_copy(update={"cpu": self.cpu.model_copy(update=given)})
        changed._located, changed._given = self._located, self._given
        return changed

    def as_dict(self) -> dict[str, Any]:
        """Plain data that `load_config` reads back as an equal configuration."""
        return self.model_dump(mode="json", exclude_none=True)


def default_preset(model: str | None = None) -> str:
    """Name of the shipped preset that is used where no configuration is given: the demo model has its own."""
    return "demo" if model is None else "default"


def load_config(source: str | Path | Mapping[str, Any] | DeployConfig | None = None, **overrides: Any) -> DeployConfig:
    """Read and check a deployment configuration.

    source: path of a YAML file, name of a shipped preset, a mapping, or None for the preset of `default_preset`.
    overrides: top-level keys ("model", "memory", ...; mappings are merged), the keyword names of `hybrimoe.inject`
        (gpu_expert_slots, expert_dtype, backend, threads, policy, lookahead, lossy), speculate, or dotted keys; None
        means not given.

    Raises ConfigError that lists every mistake as `file:line: key: what was expected`.
    """
    config = read_config(source, **overrides)
    config.check_scheduler()
    return config


def read_config(source: str | Path | Mapping[str, Any] | DeployConfig | None = None, **overrides: Any) -> DeployConfig:
    """`load_config` without the check of policies (`DeployConfig.check_scheduler`), which imports Numba."""
    given = _override_tree({name: value for name, value in overrides.items() if value is not None})
    if isinstance(source, DeployConfig):
        located = source._located if not given else Located(source.as_dict(), source.source, source._located.lines)
        if not given:
            return source
    else:
        located = _read_source(source, given.get("model"))
    if not isinstance(located.data, Mapping):
        raise ConfigError(f"{located.where()}: expected a mapping of keys, found {type(located.data).__name__}")
    return _validated(_merged(located.data, given), located, given)


def json_schema() -> dict[str, Any]:
    """JSON Schema of deployment files, for editors."""
    return DeployConfig.model_json_schema()


_ALIASES: dict[str, KeyPath] = {
    "gpu_expert_slots": ("memory", "gpu_experts"),
    "expert_dtype": ("cpu", "expert_dtype"),
    "dense_dtype": ("cpu", "dense_dtype"),
    "attention": ("cpu", "attention"),
    "step": ("cpu", "step"),
    "backend": ("cpu", "backend"),
    "threads": ("cpu", "threads"),
    "policy": ("scheduler", "policy"),
    "lookahead": ("scheduler", "lookahead"),
    "lossy": ("scheduler", "lossy"),
    "speculate": ("generation", "speculate"),
    "context_shift": ("generation", "context_shift"),
    "attention_sinks": ("generation", "attention_sinks"),
    "kv_dtype": ("memory", "kv_dtype"),
    "rope_scaling": ("rope", "scaling"),
    "rope_factor": ("rope", "factor"),
    "rope_original_context": ("rope", "original_context"),
    "host_copy": ("memory", "host_copy"),
}


def _override_tree(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword overrides as a nested mapping of the file's form."""
    tree: dict[str, Any] = {}
    for name, value in overrides.items():
        path = _ALIASES.get(name, tuple(name.split(".")))
        if path[0] not in DeployConfig.model_fields:
            raise ConfigError(unknown("option", name, [*DeployConfig.model_fields, *_ALIASES]))
        level = tree
        for key in path[:-1]:
            level = level.setdefault(str(key), {})
        last = str(path[-1])
        both = isinstance(level.get(last), dict) and isinstance(value, Mapping)
        level[last] = {**level[last], **value} if both else (dict(value) if isinstance(value, Mapping) else value)
    return tree


def _read_source(source: str | Path | Mapping[str, Any] | None, model: str | None) -> Located:
    if isinstance(source, Mapping):
        return Located(dict(source))
    try:
        located = read_yaml(shipped.find("deploy", default_preset(model) if source is None else source))
    except YamlRulesError as error:
        raise ConfigError(str(error)) from error
    return Located({}, located.source, located.lines) if located.data is None else located


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; mappings are merged, except that a policy given on top replaces the parts below it."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if key == "scheduler" and isinstance(value, Mapping) and "policy" in value and isinstance(below, Mapping):
            below = {name: below[name] for name in ("lookahead", "lossy") if name in below}
        mergeable = isinstance(below, Mapping) and isinstance(value, Mapping) and key not in ("rules", "lossy")
        result[key] = _merged(below, value) if mergeable and isinstance(below, Mapping) else value
    return result


def _validated(data: dict[str, Any], located: Located, given: Mapping[str, Any]) -> DeployConfig:
    from pydantic import ValidationError

    sections = ("memory", "cpu", "scheduler", "generation", "server")
    empty_sections = [key for key in sections if key in data and data[key] is None]
    try:
        config = DeployConfig.model_validate({key: value for key, value in data.items() if key not in empty_sections})
    except ValidationError as error:
        raise config_error(error, DeployConfig, located, given) from error
    config._located, config._given = located, given
    return _with_resolved_paths(config, located, given)


def _with_resolved_paths(config: DeployConfig, located: Located, given: Mapping[str, Any]) -> DeployConfig:
    """Relative paths in a file are meant from that file's folder; where nothing is there, they stay as written.

    Environment variables ($HOME, ${HOME}) are expanded, as a shell does it for the command line. Raises ConfigError for
    one that is not set.
    """
    folder = Path(located.source).parent
    changed: dict[str, Any] = {}
    for key in ("model", "rules"):
        value = getattr(config, key)
        if key not in given and isinstance(value, str) and value != "auto":
            changed[key] = _from_folder(value, folder, f"{locate((key,), located, given)}: {key}")
    if "adapters" not in given and config.adapters:
        where = f"{locate(('adapters',), located, given)}: adapters"
        changed["adapters"] = resolved_adapters(config.adapters, lambda path: _from_folder(path, folder, where))
    if "server" not in given:
        of_server = _server_paths(config.server, folder, lambda key: locate(("server", key), located, given))
        if of_server:
            changed["server"] = config.server.model_copy(update=of_server)
    if not changed:
        return config
    moved = config.model_copy(update=changed)
    moved._located, moved._given = located, given
    return moved


def _server_paths(server: ServerConfig, folder: Path, where: Callable[[str], str]) -> dict[str, Any]:
    """The files and models that `server` names, resolved. where: the place of a key of it."""

    def resolved(key: str, path: str) -> str:
        return _from_folder(path, folder, f"{where(key)}: server.{key}")

    paths = {key: getattr(server, key) for key in ("api_key_file", "tls_cert_file", "tls_key_file")}
    changed: dict[str, Any] = {key: resolved(key, path) for key, path in paths.items() if path is not None}
    for key in ("prefix_cache_folder", "slot_save_path"):
        if getattr(server, key) is not None:
            changed[key] = resolved(key, getattr(server, key))
    if isinstance(server.models, str):
        changed["models"] = resolved("models", server.models)
    elif server.models is not None:
        of_models = partial(resolved, "models")
        changed["models"] = {name: _with_model(entry, of_models) for name, entry in server.models.items()}
    return changed


def _with_model(entry: str | dict[str, Any], resolved: Callable[[str], str]) -> str | dict[str, Any]:
    """An entry of `server.models` with the paths of its model and of its adapters resolved."""
    if isinstance(entry, str):
        return resolved(entry)
    own = {**entry, "model": resolved(entry["model"])} if isinstance(entry.get("model"), str) else entry
    adapters = [own["adapters"]] if isinstance(own.get("adapters"), str) else own.get("adapters")
    if not isinstance(adapters, list) or not all(isinstance(name, str) for name in adapters):
        return own
    return {**own, "adapters": list(resolved_adapters(tuple(adapters), resolved))}


def _from_folder(path: str, folder: Path, place: str) -> str:
    """The path with its environment variables expanded, inside `folder` where something is there, else as written."""
    expanded = os.path.expandvars(path)
    if (folder / expanded).exists():
        return str(folder / expanded)
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset is not None:
        raise ConfigError(
            f"{place}: the environment variable {unset.group()} is not set; set it, or write the path out"
        )
    return expanded
