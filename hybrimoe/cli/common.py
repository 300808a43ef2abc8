"""Arguments and options that several commands share, and what becomes of them.

A command takes options one by one, or as a group: a parameter whose type is a dataclass (`grouped`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from hybrimoe.amounts import Amount
    from hybrimoe.config.deploy import DeployConfig, RopeConfig
    from hybrimoe.generation import SamplingOptions

PLACEMENT, SAMPLING, OUTPUT, BATCHES = "Where it runs", "Sampling", "Output", "Many prompts"
PREFIXES = "What is kept of prompts and replies"

API_KEY_VARIABLE = "HYBRIMOE_API_KEY"
"""Holds a key that the server asks for, and that `hybrimoe ctl` sends."""

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Model directory, GGUF file, hub id, or smollm2; none is the demo model in the package."
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout instead of text.", rich_help_panel=OUTPUT)
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="Deployment YAML, or the name of a preset.", rich_help_panel=PLACEMENT
    ),
]
AcceleratorOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cuda:0, xpu:0, emulated, none, or auto; a,b uses both, a block of layers each.",
        rich_help_panel=PLACEMENT,
    ),
]
SlotsOption = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Experts on the accelerator: a number, a share like 0.25, a size like 6GiB, or auto.",
        rich_help_panel=PLACEMENT,
    ),
]
HostMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Host memory for experts, as 8GiB, a share of it, or auto; the others are read from disk.",
        rich_help_panel=PLACEMENT,
    ),
]
HostCopyOption = Annotated[
    str | None,
    typer.Option(
        metavar="keep|drop",
        help="drop: experts that policy static has put into slots leave host memory.",
        rich_help_panel=PLACEMENT,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="Experts as float32, bfloat16, int8, int6, int5, int4, int3, int2; auto: as suits the file.",
        rich_help_panel=PLACEMENT,
    ),
]
KvDtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="Keys and values as float32, bfloat16, int8, int4; auto: as the model computes them. On the CPU alone.",
        rich_help_panel=PLACEMENT,
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="ours, hybrimoe, static, ..., or a balance, prefetch and cache joined by /.",
        rich_help_panel=PLACEMENT,
    ),
]
LossyOption = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="Lossy policy: hobbit, skip, ..., with parameters as in hobbit:t1=0.5; none. See docs/lossy.md.",
        rich_help_panel=PLACEMENT,
    ),
]
LossyList = Annotated[
    list[str] | None,
    typer.Option("--lossy", metavar="KIND", help="Each policy with this lossy one, too; may be repeated."),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads of the CPU lane.", rich_help_panel=PLACEMENT)]
LookaheadOption = Annotated[
    int | None, typer.Option(min=0, max=64, help="Layers ahead whose routers are asked.", rich_help_panel=PLACEMENT)
]

UnknownKeysOption = Annotated[
    str | None,
    typer.Option(
        metavar="error|ignore",
        help="Weights of the checkpoint that the model does not have: an error (default), or left out.",
        rich_help_panel=PLACEMENT,
    ),
]

VisionOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|none",
        help="none leaves the part of the model out that sees images, for memory.",
        rich_help_panel=PLACEMENT,
    ),
]

AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR[:SCALE]",
        help="PEFT adapter (LoRA) to merge into the weights while they are read; may be repeated.",
        rich_help_panel=PLACEMENT,
    ),
]

TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", "-t", min=0, help="0 is greedy.", rich_help_panel=SAMPLING)
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", min=0, max=1, help="Keep this share of probability.", rich_help_panel=SAMPLING),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", min=0, help="Keep so many tokens; 0: all.", rich_help_panel=SAMPLING)
]
MinPOption = Annotated[
    float | None,
    typer.Option("--min-p", min=0, max=1, help="Keep tokens with this share of the best.", rich_help_panel=SAMPLING),
]
RepetitionOption = Annotated[
    float | None, typer.Option("--repetition-penalty", help="1 is none.", rich_help_panel=SAMPLING)
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="The same seed, the same text.", rich_help_panel=SAMPLING)]
StopOption = Annotated[
    list[str] | None, typer.Option(help="Text that ends the reply; may be repeated.", rich_help_panel=SAMPLING)
]
NewTokensOption = Annotated[
    int | None,
    typer.Option("--max-new-tokens", "-n", min=1, help="Longest reply, in tokens.", rich_help_panel=SAMPLING),
]

TimelineOption = Annotated[
    bool, typer.Option("--timeline", help="Draw what each lane did in one step.", rich_help_panel=OUTPUT)
]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write a Chrome/Perfetto trace.", rich_help_panel=OUTPUT),
]
SpeculateOption = Annotated[
    bool | None,
    typer.Option(
        "--speculate/--no-speculate",
        help="Drafts from the text itself, several tokens a step; the same text. For models on the CPU alone.",
        rich_help_panel=PLACEMENT,
    ),
]
RopeScalingOption = Annotated[
    str | None,
    typer.Option(
        "--rope-scaling",
        metavar="none|linear|dynamic|yarn",
        help="Stretch the model's context by --rope-scale; none: leave out what its configuration asks for.",
        rich_help_panel=PLACEMENT,
    ),
]
RopeFactorOption = Annotated[
    float | None,
    typer.Option(
        "--rope-scale",
        "--rope-factor",
        metavar="N",
        min=1,
        max=1024,
        help="With --rope-scaling: the context becomes N times as long as the model was trained for.",
        rich_help_panel=PLACEMENT,
    ),
]
RopeOriginalOption = Annotated[
    int | None,
    typer.Option(
        "--yarn-orig-ctx",
        metavar="TOKENS",
        min=1,
        help="With --rope-scaling: what the model was trained for, where its configuration does not say it.",
        rich_help_panel=PLACEMENT,
    ),
]
ContextShiftOption = Annotated[
    bool | None,
    typer.Option(
        "--context-shift/--no-context-shift",
        help="Leave the oldest tokens out where a text outgrows the context, instead of an error (off).",
        rich_help_panel=PLACEMENT,
    ),
]
SinksOption = Annotated[
    int | None,
    typer.Option(
        "--attention-sinks",
        metavar="N",
        min=0,
        max=65_536,
        help="With --context-shift: first tokens that always stay (4).",
        rich_help_panel=PLACEMENT,
    ),
]
ProfileOption = Annotated[
    bool,
    typer.Option("--profile", help="Where a token's time went, by part of the model and lane.", rich_help_panel=OUTPUT),
]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer takes it: its parameters of a dataclass type become the fields of that dataclass.

    A field is annotated as a parameter of a command is (`Annotated[int, typer.Option(...)]`) and has a default.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.annotation, type) and dataclasses.is_dataclass(parameter.annotation)
    }
    parameters = [
        option
        for parameter in signature.parameters.values()
        for option in (_options_of(groups[parameter.name]) if parameter.name in groups else [_by_name(parameter)])
    ]

    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what inspect reads
    return run


def _options_of(group: type[Any]) -> list[inspect.Parameter]:
    types = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
        )
        for field in dataclasses.fields(group)
    ]


def _by_name(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


FitOption = Annotated[
    bool,
    typer.Option(
        "--fit",
        help="Choose what this machine has room for: dtypes, memory of each tier, context, replies at once; says why.",
    ),
]


@dataclass(frozen=True, slots=True)
class PlacementGroup:
    """Where a model runs: a deployment file or preset, and what goes over it."""

    config: ConfigOption = None
    accelerator: AcceleratorOption = None
    slots: SlotsOption = None
    host_memory: HostMemoryOption = None
    host_copy: HostCopyOption = None
    dtype: DtypeOption = None
    kv_dtype: KvDtypeOption = None
    policy: PolicyOption = None
    lossy: LossyOption = None
    threads: ThreadsOption = None
    lookahead: LookaheadOption = None
    unknown_keys: UnknownKeysOption = None
    vision: VisionOption = None
    speculate: SpeculateOption = None
    context_shift: ContextShiftOption = None
    attention_sinks: SinksOption = None
    rope_scaling: RopeScalingOption = None
    rope_factor: RopeFactorOption = None
    rope_original_context: RopeOriginalOption = None
    adapter: AdapterOption = None

    def deployment(self, model: str | None) -> DeployConfig:
        """As `deploy_config`."""
        options = {name: getattr(self, name) for name in self.__slots__ if name != "config"}
        return deploy_config(self.config, model=model, **options)


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Where what prompts and replies computed is kept, so that a prompt that begins alike need not compute it."""

    prefix_cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="In host memory: 4GiB, a share, none (half of what is free).",
            rich_help_panel=PREFIXES,
        ),
    ] = None
    prefix_cache_disk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="On disk, for the next start, too: 20GiB, a share, auto, none (none).",
            rich_help_panel=PREFIXES,
        ),
    ] = None
    prefix_cache_folder: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where on disk (prefixes, in HYBRIMOE_CACHE).", rich_help_panel=PREFIXES),
    ] = None

    def over(self, deployment: DeployConfig) -> DeployConfig:
        """`deployment` with what is given. Raises ConfigError for what is no size."""
        chosen: dict[str, Any] = {
            name: _size(f"--{name.replace('_', '-')}", text)
            for name in ("prefix_cache", "prefix_cache_disk")
            if (text := getattr(self, name)) is not None
        }
        if self.prefix_cache_folder is not None:
            chosen["prefix_cache_folder"] = self.prefix_cache_folder
        return deployment.model_copy(update={"server": deployment.server.model_copy(update=chosen)})


def _size(option: str, text: str) -> Amount:
    """An amount of memory or disk. Raises ConfigError for what is none."""
    from hybrimoe.amounts import parse_amount
    from hybrimoe.errors import ConfigError

    expected = f"{option}: expected a size like 4GiB, a share like 0.25, auto or none, found {text!r}"
    try:
        amount = parse_amount(text)
    except ConfigError as error:
        raise ConfigError(expected) from error
    if amount.kind == "count":
        raise ConfigError(expected)
    return amount


@dataclass(frozen=True, slots=True)
class SamplingGroup:
    """How tokens are chosen, and where a reply ends."""

    max_new_tokens: NewTokensOption = None
    temperature: TemperatureOption = None
    top_p: TopPOption = None
    top_k: TopKOption = None
    min_p: MinPOption = None
    repetition_penalty: RepetitionOption = None
    seed: SeedOption = None
    stop: StopOption = None

    def options(self) -> SamplingOptions:
        """As `hybrimoe.generation` takes them; in `stop` \\n and \\t stand for a line end and a tab."""
        from hybrimoe.generation import SamplingOptions

        given = {name: getattr(self, name) for name in self.__slots__ if name != "stop"}
        stop = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in self.stop or ())
        return SamplingOptions(**given, stop=stop)


OPTION_OF_KEY = {
    "accelerator": "--accelerator", "memory.gpu_experts": "--slots", "memory.host": "--host-memory",
    "memory.kv_dtype": "--kv-dtype", "cpu.expert_dtype": "--dtype", "cpu.threads": "--threads",
    "scheduler.policy": "--policy", "scheduler.lookahead": "--lookahead", "scheduler.lossy": "--lossy",
    "generation.attention_sinks": "--attention-sinks", "rope.scaling": "--rope-scaling",
    "rope.factor": "--rope-scale", "rope.original_context": "--yarn-orig-ctx",
}  # fmt: skip
"""Options by the key of a deployment file that they stand for."""


@contextlib.contextmanager
def _options_named() -> Iterator[None]:
    """A ConfigError names the option that a value came from, not the key that it stands for."""
    from hybrimoe.errors import ConfigError

    try:
        yield
    except ConfigError as error:
        told = re.sub(
            r"^<option>: ([\w.]+)(?=:)", lambda found: OPTION_OF_KEY.get(found[1], found[0]), str(error), flags=re.M
        )
        raise ConfigError(told) from error


@_options_named()
def deploy_config(
    config: str | None,
    *,
    model: str | None,
    accelerator: str | None = None,
    slots: str | None = None,
    host_memory: str | None = None,
    host_copy: str | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    policy: str | None = None,
    threads: int | None = None,
    lookahead: int | None = None,
    lossy: str | None = None,
    unknown_keys: str | None = None,
    vision: str | None = None,
    speculate: bool | None = None,
    context_shift: bool | None = None,
    attention_sinks: int | None = None,
    rope_scaling: str | None = None,
    rope_factor: float | None = None,
    rope_original_context: int | None = None,
    adapter: list[str] | None = None,
    weights: bool = True,
) -> DeployConfig:
    """The deployment that a command line describes: a file or preset, with the given options on top.

    Its model, rules and policies must be there, and with `weights` the model's weights: commands come here before they
    import torch and transformers, so that what is wrong is said at once. Raises ConfigError, ModelError,
    CheckpointError and RuleError.
    """
    from hybrimoe.checkpoint.adapters.settings import check_adapters
    from hybrimoe.checkpoint.source import check_model
    from hybrimoe.config.deploy import read_config
    from hybrimoe.config.scheduler import lossy_option

    deployment = read_config(
        config,
        model=model,
        accelerator=_names(accelerator),
        gpu_expert_slots=slots,
        memory=None if host_memory is None else {"host": host_memory, "disk": "auto"},
        host_copy=host_copy,
        expert_dtype=dtype,
        kv_dtype=kv_dtype,
        policy=policy,
        threads=threads,
        lookahead=lookahead,
        lossy=None if lossy is None else lossy_option(lossy),
        unknown_keys=unknown_keys,
        vision=vision,
        speculate=speculate,
        context_shift=context_shift,
        attention_sinks=attention_sinks,
        rope_scaling=rope_scaling,
        rope_factor=rope_factor,
        rope_original_context=rope_original_context,
        adapters=adapter,
    )
    check_model(deployment.model, weights=weights)
    check_adapters(deployment.adapters)
    check_rules(deployment.rules)
    deployment.check_scheduler()
    return deployment


@_options_named()
def rope_config(scaling: str | None, factor: float | None, original_context: int | None) -> RopeConfig | None:
    """What the options of a command without a deployment say of a model's context. Raises ConfigError."""
    from hybrimoe.config.deploy import read_config

    return read_config({}, rope_scaling=scaling, rope_factor=factor, rope_original_context=original_context).rope


def check_rules(rules: Any) -> None:
    """Raises RuleError where `rules` (a shipped name, a file, or inline) cannot be read; operators come later."""
    from hybrimoe.errors import RuleError
    from yaml_rules.errors import YamlRulesError
    from yaml_rules.loader import load_rules

    if isinstance(rules, str) and rules != "auto":
        try:
            load_rules(rules)
        except YamlRulesError as error:
            raise RuleError(str(error)) from error


def check_readable(path: Path | None) -> None:
    """Raises FileError where `path` cannot be read, before the imports and the work that come before it is."""
    from hybrimoe.errors import FileError

    if path is None:
        return
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise FileError(f"cannot read {path} ({error.strerror}): expected a file that exists") from error


def check_writable(path: Path | None) -> None:
    """Raises FileError where no file can be written at `path`, before the work whose result it is for."""
    from hybrimoe.errors import FileError

    if path is None:
        return
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise FileError(
            f"cannot write {path} ({error.strerror}): expected a file in a directory that exists and can be written to"
        ) from error
    if not existed:
        path.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a result: a disk that fills in the middle is told with the file's name (FileError)."""
    from hybrimoe.errors import FileError

    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path} ({error.strerror}): make room, or give another file") from error


def check_folder(path: Path | None) -> None:
    """Makes the folder `path` where it is not there. Raises FileError where that cannot be."""
    from hybrimoe.errors import FileError

    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {path} ({error.strerror}): expected a place for a folder") from error


def _names(accelerator: str | None) -> str | list[str] | None:
    return [name.strip() for name in accelerator.split(",")] if accelerator and "," in accelerator else accelerator
