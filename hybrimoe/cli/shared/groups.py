"""Options as groups: a parameter of a command whose type is a dataclass becomes its fields."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from hybrimoe.cli.shared.deployment import deploy_config
from hybrimoe.cli.shared.options import (
    AcceleratorOption,
    AdapterOption,
    ConfigOption,
    ContextShiftOption,
    DtypeOption,
    HostCopyOption,
    HostMemoryOption,
    KvDtypeOption,
    LookaheadOption,
    LossyOption,
    MinPOption,
    NewTokensOption,
    PolicyOption,
    RepetitionOption,
    RopeFactorOption,
    RopeOriginalOption,
    RopeScalingOption,
    SeedOption,
    SinksOption,
    SlotsOption,
    SpeculateOption,
    StopOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    UnknownKeysOption,
    VisionOption,
)

if TYPE_CHECKING:
    from hybrimoe.amounts import Amount
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation import SamplingOptions

PREFIXES = "What is kept of prompts and replies"


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
