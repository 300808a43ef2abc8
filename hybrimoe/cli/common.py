"""Arguments and options that several commands share, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation import SamplingOptions

PLACEMENT, SAMPLING, OUTPUT, BATCHES = "Where it runs", "Sampling", "Output", "Many prompts"

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Model directory or hub id; none is the demo model of the package."),
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
DtypeOption = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="Experts as float32, bfloat16, int8, or int4.", rich_help_panel=PLACEMENT),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="ours, hybrimoe, static, ..., or balance/prefetch/cache.", rich_help_panel=PLACEMENT
    ),
]
LossyOption = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="Lossy policy: hobbit, skip, ..., with parameters as in hobbit:t1=0.5,t2=0.8; none. See docs/lossy.md.",
        rich_help_panel=PLACEMENT,
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads of the CPU lane.", rich_help_panel=PLACEMENT)]
LookaheadOption = Annotated[
    int | None, typer.Option(min=0, max=64, help="Layers ahead whose routers are asked.", rich_help_panel=PLACEMENT)
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
ProfileOption = Annotated[
    bool,
    typer.Option("--profile", help="Where a token's time went, by part of the model and lane.", rich_help_panel=OUTPUT),
]


def deploy_config(
    config: str | None,
    *,
    model: str | None,
    accelerator: str | None = None,
    slots: str | None = None,
    dtype: str | None = None,
    policy: str | None = None,
    threads: int | None = None,
    lookahead: int | None = None,
    lossy: str | None = None,
    speculate: bool | None = None,
) -> DeployConfig:
    """The deployment that a command line describes: a file or preset, with the given options on top."""
    from hybrimoe.config.deploy import load_config
    from hybrimoe.config.scheduler import lossy_option

    return load_config(
        config,
        model=model,
        accelerator=_names(accelerator),
        gpu_expert_slots=slots,
        expert_dtype=dtype,
        policy=policy,
        threads=threads,
        lookahead=lookahead,
        lossy=None if lossy is None else lossy_option(lossy),
        speculate=speculate,
    )


def _names(accelerator: str | None) -> str | list[str] | None:
    return [name.strip() for name in accelerator.split(",")] if accelerator and "," in accelerator else accelerator


def sampling_options(**given: Any) -> SamplingOptions:
    """Sampling options of a command line; in `stop` (None or a list) \\n and \\t stand for a line end and a tab."""
    from hybrimoe.generation import SamplingOptions

    stop = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in given.pop("stop") or ())
    return SamplingOptions(**given, stop=stop)
