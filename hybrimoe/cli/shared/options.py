"""Options that several commands take, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PLACEMENT, SAMPLING, OUTPUT, BATCHES = "Where it runs", "Sampling", "Output", "Many prompts"

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


FitOption = Annotated[
    bool,
    typer.Option(
        "--fit",
        help="Choose what this machine has room for: dtypes, memory of each tier, context, replies at once; says why.",
    ),
]
