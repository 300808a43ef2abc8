"""`hybrimoe convert`: a model packed once into a folder that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrimoe.cli.shared.deployment import deploy_config
from hybrimoe.cli.shared.options import AdapterOption, ConfigOption, DtypeOption, JsonOption, UnknownKeysOption
from hybrimoe.cli.views import render


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("convert")(convert_command)


def convert_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, GGUF file or hub id.")],
    into: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")],
    config: ConfigOption = None,
    dtype: DtypeOption = None,
    dense_dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="All other weights: auto, float32, bfloat16, float16, int8, or int4."),
    ] = None,
    unknown_keys: UnknownKeysOption = None,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack a model once: experts, dense layers, tokenizer, configuration and checksums, in one folder.

    The folder is a MODEL for every other command. Its experts are mapped; the original is not needed again. It appears
    when it is whole: nothing is left where the disk fills or the command is ended.
    """
    deployment = deploy_config(config, model=model, dtype=dtype, unknown_keys=unknown_keys, adapter=adapter)
    from hybrimoe.cli.shared.opening import progress_bar, quiet_libraries, warnings_as_notes

    quiet_libraries()
    from hybrimoe.checkpoint import convert

    with progress_bar(beginning="reading the checkpoint") as progress, warnings_as_notes():
        made = convert(model, into, deployment, progress=progress, dense_dtype=dense_dtype)
    if as_json:
        render.emit_json(made)
        return
    what = "made" if made.is_new else "there already:"
    dense = "" if made.dense_dtype == "auto" else f", dense layers {made.dense_dtype}"
    size = f"{made.n_bytes / 2**30:.2f} GiB"
    render.out().print(f"{what} {made.path}: experts {made.expert_dtype}{dense}, {size}", markup=False, soft_wrap=True)
    if not made.has_tokenizer:
        render.note("note: the model has no tokenizer that could be taken along")
