"""The files in docs/deploy.md are ones that systemd, a container builder, and HybriMoE take."""

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from hybrimoe.config.deploy import load_config
from tests.test_docs_commands import parse

PAGE = Path(__file__).resolve().parents[1] / "docs" / "deploy.md"
INSTRUCTIONS = {"FROM", "RUN", "COPY", "USER", "ENV", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def unit():
    (text,) = blocks("ini")
    return text


def test_the_unit_is_one_that_systemd_takes(unit, tmp_path):
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    (start,) = re.findall(r"^ExecStart=(\S+) .*$", unit, re.MULTILINE)
    file = tmp_path / "hybrimoe.service"
    file.write_text(unit.replace(start, shutil.which("true")))
    result = subprocess.run([verify, "verify", "--man=no", str(file)], capture_output=True, text=True, check=False)
    said = [line for line in result.stderr.splitlines() if "hybrimoe.service" in line]
    assert not said, result.stderr


def test_the_units_command_and_deployment_are_ones_that_hybrimoe_takes(unit):
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    parse(shlex.split(command)[1:])
    deployment, scrape = (yaml.safe_load(text) for text in blocks("yaml"))
    stop_s = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])
    assert load_config({**deployment, "model": None}).server.drain_seconds + 10 < stop_s
    assert scrape["scrape_configs"][0]["job_name"] == "hybrimoe"


def test_the_container_file_runs_the_server_as_nobody_in_particular():
    (text,) = blocks("dockerfile")
    lines = [line.split(" ", 1) for line in text.splitlines()]
    assert {name for name, _ in lines} <= INSTRUCTIONS
    assert lines[0][0] == "FROM"
    assert [rest for name, rest in lines if name == "USER"] == ["hybrimoe"]
    told = dict(lines)
    entry, more = (yaml.safe_load(told[name]) for name in ("ENTRYPOINT", "CMD"))
    parse([*entry[1:], *more])
    compile(yaml.safe_load(told["HEALTHCHECK"].split("CMD ")[1])[2], "<health>", "exec")


def test_metrics_of_the_page_are_metrics_of_the_server():
    from hybrimoe.server.metrics import Metrics
    from hybrimoe.server.models import Models

    metrics = Metrics(Models({"x": None}))
    known = {metric.name for metric in metrics.registry.collect()}
    named = set(re.findall(r"hybrimoe_\w+", "".join(re.findall(r"^\|.*\|$", PAGE.read_text(), re.MULTILINE))))
    assert {name.removesuffix("_total") for name in named} <= known


def test_the_agent_of_the_clients_page_is_a_program_whose_tool_the_server_takes():
    from hybrimoe.server.apis.chat import ToolDefinition

    text = (PAGE.parent / "clients.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    tree = ast.parse(program)
    (tools,) = (
        ast.literal_eval(one.value)
        for one in tree.body
        if isinstance(one, ast.Assign) and getattr(one.targets[0], "id", "") == "tools"
    )
    assert [ToolDefinition.model_validate(tool).function.tool().name for tool in tools] == ["add"]


def test_links_within_the_pages_lead_somewhere():
    for page in ("clients.md", "deploy.md"):
        for target in re.findall(r"\]\(([\w./#-]+)\)", (PAGE.parent / page).read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            text = (PAGE.parent / name).read_text(encoding="utf-8")
            headings = {
                re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in text.splitlines()
                if line.startswith("#")
            }
            assert not anchor or anchor in headings, (page, target)
