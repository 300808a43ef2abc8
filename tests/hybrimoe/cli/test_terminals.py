"""The program in narrow, wide, dumb and colourless terminals, and where only ASCII can be printed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from hybrimoe.cli.views import render

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
ENVIRONMENTS = {
    "narrow": {"COLUMNS": "40"},
    "wide": {"COLUMNS": "200"},
    "unknown width": {"COLUMNS": None},
    "dumb": {"TERM": "dumb"},
    "no colour": {"NO_COLOR": "1"},
    "forced colour": {"FORCE_COLOR": "1"},
    "ascii": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"},
}
RUN = """
from hybrimoe.cli.app import app
lines = {
    "--help": 0, "generate --help": 0, "rules list": 0, "genrate": 2, "generate --promt x": 2,
    "rules check gone.yaml": 1, "generate --prompt \\u2603 gone": 1,
}
for line, code in lines.items():
    found = app(line.split(), standalone_mode=False, prog_name="hybrimoe")
    assert found == code, (line, found)
"""


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_help_tables_and_errors_are_printed(name, tmp_path):
    environment = dict(os.environ)
    for variable, value in ENVIRONMENTS[name].items():
        environment.pop(variable, None)
        environment |= {} if value is None else {variable: value}
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, env=environment, cwd=tmp_path, timeout=600)
    printed = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0, printed
    assert "defect" not in printed
    assert "Traceback" not in printed
    plain = ESCAPE.sub("", printed)
    assert "gone.yaml" in plain
    assert "explain-step" in plain
    assert (plain != printed) == (name == "forced colour")
    columns = int(environment.get("COLUMNS", "80"))
    tables = ESCAPE.sub("", done.stdout.decode("utf-8", "replace")).splitlines()  # terminals wrap what is on stderr
    assert max(map(len, tables)) <= columns


def test_no_figure_of_a_narrow_table_is_cut():
    spread, columns = (
        "265.44 (237.95-292.93)",
        ("in memory", "", "prefill", "decode", "reads waited for", "most memory"),
    )
    for width in (20, 40, 80):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        console.print(render.table("tokens/s", columns, [("25%", "llama.cpp", spread, spread, "1", "424")]))
        shown = console.file.getvalue()
        assert "…" not in shown
        for digit in set("0123456789"):
            assert shown.count(digit) >= (spread * 2 + "25% 1 424").count(digit)
