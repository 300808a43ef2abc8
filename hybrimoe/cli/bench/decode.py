"""`hybrimoe bench decode`: policies and dtypes side by side, in tokens a second."""

from __future__ import annotations

from typing import Annotated

import typer

from hybrimoe.cli.bench import model_run
from hybrimoe.cli.shared.groups import grouped
from hybrimoe.cli.shared.options import JsonOption, ModelArgument, ProfileOption

QUICK_TOKENS = 24
"""Most tokens of a round with --quick."""


def register(app: typer.Typer) -> None:
    """Add `decode`."""
    app.command("decode")(grouped(decode))


def decode(
    *,
    model: ModelArgument = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Decode steps a round.")] = 64,
    contenders: model_run.ContendersGroup,
    profile: ProfileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tokens a second of decoding: policies and dtypes side by side in alternating rounds.

    Before anything is timed, the logits of every contender are compared with plain transformers'; wrong numbers end
    the benchmark. A shape runs as a model of it would; the demo model, and what needs slots (--policy, --slots), have
    an emulated accelerator where there is none. Such figures say so: that lane runs on the CPU, too. With --profile, a
    reply after the rounds shows where a token's time goes.
    """
    steps = min(new_tokens, QUICK_TOKENS) if contenders.quick else new_tokens
    contenders.measured("decode", model, prompt_tokens, steps, profile=profile, as_json=as_json)
