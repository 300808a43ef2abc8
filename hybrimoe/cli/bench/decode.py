"""`hybrimoe bench decode`: policies and dtypes side by side, in tokens a second."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from hybrimoe.cli import common
from hybrimoe.cli.bench import model_run, options


def register(app: typer.Typer) -> None:
    """Add `decode`."""
    app.command("decode")(decode)


def decode(
    model: common.ModelArgument = None,
    shape: options.ShapeOption = None,
    layers: options.LayersOption = None,
    policy: options.PolicyList = None,
    lossy: options.LossyList = None,
    dtype: options.DtypeList = None,
    compare_policies: options.CompareOption = False,
    plain: options.PlainOption = True,
    gguf: options.GgufOption = None,
    llama_cpp: options.LlamaCppOption = False,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Decode steps a round.")] = 64,
    rounds: options.RoundsOption = 7,
    config: common.ConfigOption = None,
    accelerator: common.AcceleratorOption = None,
    slots: common.SlotsOption = None,
    threads: common.ThreadsOption = None,
    quick: options.QuickOption = False,
    profile: common.ProfileOption = False,
    csv: options.CsvOption = None,
    plot: options.PlotOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Tokens a second of decoding: policies and dtypes side by side in alternating rounds.

    Before anything is timed, the logits of every contender are compared with plain transformers'; wrong numbers end
    the benchmark. Figures with an emulated accelerator say so: that lane runs on the CPU, too. With --profile, a reply
    after the rounds shows where a token's time goes.
    """
    from hybrimoe.bench.model import measure as model_bench

    request = model_bench.Request(
        kind="decode",
        model=model,
        shape=shape,
        layers=layers,
        policies=tuple(policy or ()),
        lossy=tuple(lossy or ()),
        dtypes=tuple(dtype or ()),
        compare_policies=compare_policies,
        plain=plain,
        gguf=gguf,
        llama_cpp=llama_cpp,
        prompt_tokens=prompt_tokens,
        new_tokens=min(new_tokens, 24) if quick else new_tokens,
        rounds=min(rounds, options.QUICK_ROUNDS) if quick else rounds,
        slots=slots,
        profile=profile,
        deploy=partial(common.deploy_config, config, model=model, accelerator=accelerator, threads=threads),
    )
    model_run.measure_and_show(request, csv=csv, plot=plot, as_json=as_json)
