"""`hybrimoe verify`: every byte of a converted model against its checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrimoe.cli.shared.options import JsonOption
from hybrimoe.cli.views import render

SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("verify")(verify_command)


def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that `hybrimoe convert` has made.")],
    as_json: JsonOption = False,
) -> None:
    """Compare every byte of a converted model with its checksums, and name the records and tensors that differ.

    Exit code 1 where something does.
    """
    from hybrimoe.checkpoint.source import check_pack

    check_pack(folder)
    from hybrimoe.checkpoint.pack.checksums import verify_pack
    from hybrimoe.cli.shared.opening import progress_bar

    with progress_bar(beginning="reading") as progress:
        found = verify_pack(folder, progress)
    if as_json:
        render.emit_json(found)
    elif not found.damaged:
        size = f"{found.n_bytes / 2**30:.2f} GiB"
        render.out().print(f"{found.n_sections} records and tensors in {found.n_files} files, {size}: as written")
    else:
        for line in found.damaged[:SHOWN]:
            render.error(line)
        if len(found.damaged) > SHOWN:
            render.error(f"and {len(found.damaged) - SHOWN} more")
        render.note("copy the pack again, or `hybrimoe convert` the model again")
    if found.damaged:
        raise typer.Exit(1)
