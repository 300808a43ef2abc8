"""What the docs of a deployment show is what systemd, a container builder, Prometheus and HybriMoE take; links lead
somewhere."""

import ast
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from hybrimoe.config.deploy import ServerConfig, load_config
from tests.test_docs_commands import parse

PAGE = Path(__file__).resolve().parents[1] / "docs" / "deploy.md"
INSTRUCTIONS = {"FROM", "RUN", "COPY", "USER", "ENV", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def blocks(kind, page=PAGE.name):
    return re.findall(rf"```{kind}\n(.*?)```", (PAGE.parent / page).read_text(encoding="utf-8"), re.DOTALL)


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
    (deployment,) = (yaml.safe_load(text) for text in blocks("yaml"))
    stop_s = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])
    assert load_config({**deployment, "model": None}).server.drain_seconds + 10 < stop_s


def test_what_watches_the_server_is_yaml_that_its_readers_take():
    scrape, traced = (yaml.safe_load(text) for text in blocks("yaml", "monitoring.md"))
    assert scrape["scrape_configs"][0]["job_name"] == "hybrimoe"
    assert load_config(traced).server.tracing.endswith("/v1/traces")


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


def test_the_container_file_names_what_there_is():
    (text,) = blocks("dockerfile")
    project = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least, (python,) = project["requires-python"].removeprefix(">="), re.findall(r"python:(\d\.\d+)-", text)
    assert [int(part) for part in python.split(".")] >= [int(part) for part in least.split(".")]
    assert f"Programming Language :: Python :: {python}" in project.get("classifiers", [])
    (extras,) = re.findall(r'\)\[([\w,-]+)\]"', text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    variables = re.findall(r"(\w+)=(\S+)", re.search(r"^ENV (.*)$", text, re.MULTILINE)[1])
    known = (PAGE.parent / "environment.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in known for name, _ in variables if name.startswith("HYBRIMOE"))
    volumes = yaml.safe_load(re.search(r"^VOLUME (.*)$", text, re.MULTILINE)[1])
    assert dict(variables)["HYBRIMOE_CACHE"] in volumes
    assert yaml.safe_load(re.search(r"^CMD (.*)$", text, re.MULTILINE)[1])[-1] in volumes
    port = str(ServerConfig().port)
    assert re.search(r"^EXPOSE (.*)$", text, re.MULTILINE)[1] == port
    run = re.search(r"^podman run (.*\n.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert re.findall(r"--volume [\w/-]+:(/\w+)", run) == volumes
    assert f":{port} " in run
    health = re.search(r"^HEALTHCHECK (.*)$", text, re.MULTILINE)[1]
    assert f":{port}/health" in health


def test_metrics_of_the_pages_are_metrics_of_the_server():
    from hybrimoe.server.metrics import Metrics
    from hybrimoe.server.models import Models

    metrics = Metrics(Models({"x": None}))
    known = {metric.name for metric in metrics.registry.collect()}
    text = "".join((PAGE.parent / name).read_text(encoding="utf-8") for name in ("monitoring.md", "tuning.md"))
    named = set(re.findall(r"hybrimoe_\w+", "".join(re.findall(r"^\|.*\|$", text, re.MULTILINE))))
    assert {name.removesuffix("_total") for name in named} <= known


def test_the_agent_of_the_agents_page_is_a_program_whose_tool_the_server_takes():
    from hybrimoe.server.apis.chat import ToolDefinition

    text = (PAGE.parent / "agents.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    tree = ast.parse(program)
    (tools,) = (
        ast.literal_eval(one.value)
        for one in tree.body
        if isinstance(one, ast.Assign) and getattr(one.targets[0], "id", "") == "tools"
    )
    assert [ToolDefinition.model_validate(tool).function.tool().name for tool in tools] == ["add"]


def anchors(page):
    """Those of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(PAGE.parent.glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_to_a_page_and_a_heading_of_it(page):
    for target, anchor in re.findall(r"\]\(([\w-]+\.md)?(?:#([\w-]+))?\)", page.read_text(encoding="utf-8")):
        if not target and not anchor:
            continue
        other = PAGE.parent / target if target else page
        assert other.is_file(), target
        assert not anchor or anchor in anchors(other), f"{target}#{anchor}"
