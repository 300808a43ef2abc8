"""`hybrimoe bench prefill`: policies and dtypes side by side, in tokens a second."""

from __future__ import annotations

from typing import Annotated

import typer

from hybrimoe.cli.bench import model_run
from hybrimoe.cli.shared.groups import grouped
from hybrimoe.cli.shared.options import JsonOption, ModelArgument

QUICK_TOKENS = 128
"""Most tokens of a round with --quick."""


def register(app: typer.Typer) -> None:
    """Add `prefill`."""
    app.command("prefill")(grouped(prefill))


def prefill(
    *,
    model: ModelArgument = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt.")] = 512,
    contenders: model_run.ContendersGroup,
    as_json: JsonOption = False,
) -> None:
    """Tokens a second of computing a prompt: policies and dtypes side by side in alternating rounds.

    Before anything is timed, the logits of every contender are compared with plain transformers'; wrong numbers end
    the benchmark. A shape runs as a model of it would; the demo model, and what needs slots (--policy, --slots), have
    an emulated accelerator where there is none. Such figures say so: that lane runs on the CPU, too.
    """
    length = min(prompt_tokens, QUICK_TOKENS) if contenders.quick else prompt_tokens
    contenders.measured("prefill", model, length, 0, as_json=as_json)
