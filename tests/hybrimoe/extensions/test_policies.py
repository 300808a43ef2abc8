"""Policies by file and entry point: found by every command, failures named, the others unharmed."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrimoe.cli.app import app
from hybrimoe.config.deploy import load_config
from hybrimoe.config.scheduler import resolved_policy
from hybrimoe.errors import ConfigError
from hybrimoe.extensions import policies
from hybrimoe.extensions.check import ContractError, check_policy
from hybrimoe.extensions.policies import PolicyImportWarning, in_place_of, load_entry_points, open_policy
from scheduler import extension
from scheduler.cache import CACHE_POLICIES
from scheduler.errors import PolicyError
from scheduler.planner.policies import resolve_policy
from scheduler.prefetch import PREFETCH_POLICIES

ROOT = Path(__file__).parents[3]
HEAD = "from scheduler.extension import *\nimport numpy as np\n"
LAST = HEAD + "@policy('{name}', balance='static')\nclass Last(CachePolicy):\n    def __init__(self, setting: Setting, weight: int = 1) -> None:\n        super().__init__(setting)\n"  # fmt: skip  # noqa: E501


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch, policies_put_back):
    """Each test's file may use the names of another test's, and no later test meets a broken policy."""
    monkeypatch.setattr(extension, "_EXTENSIONS", {})
    before = dict(CACHE_POLICIES), dict(PREFETCH_POLICIES)
    yield
    for registry, known in zip((CACHE_POLICIES, PREFETCH_POLICIES), before, strict=True):
        registry.clear()
        registry.update(known)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LAST.format(name="file_policy"))
    return tmp_path / "mine.py"


def test_a_file_is_a_policy(mine):
    found = open_policy("mine.py:weight=3")
    assert (found.name, dict(found.params), found.files) == ("file_policy", {"weight": 3}, (mine,))
    assert open_policy(f"{mine}::hybrimoe/none/file_policy").name == "hybrimoe/none/file_policy"
    assert in_place_of("mine.py:weight=3", {str(mine): "/far/mine.py"}) == "/far/mine.py:weight=3"


def test_a_changed_file_is_imported_again(mine):
    open_policy("mine.py")
    mine.write_text(LAST.format(name="file_policy").replace("weight: int = 1", "height: float = 2.0"))
    assert open_policy("mine.py:height=1").params == {"height": 1}


@pytest.mark.parametrize(
    ("source", "text", "error", "message"),
    [
        ("def broken(:", "mine.py", ConfigError, "line 1 cannot be imported: SyntaxError"),
        ("import nothing_of_that_name", "mine.py", ConfigError, "ModuleNotFoundError"),
        ("x = 1", "mine.py", ConfigError, "has no policy"),
        (LAST.format(name="lru"), "mine.py", ConfigError, "one of HybriMoE's own"),
        (LAST.format(name="one_of_2") + LAST.format(name="two_of_2"), "mine.py", ConfigError, "has several policies"),
        (LAST.format(name="file_policy"), "gone.py", ConfigError, "no policy file at gone.py"),
        (LAST.format(name="file_policy"), "mine.py:weight=big", PolicyError, "weight must be an integer"),
        (LAST.format(name="file_policy"), "mine.py:weight", PolicyError, "expected NAME or NAME:parameter=value"),
        (LAST.format(name="file_policy"), "hybrimo", PolicyError, "did you mean 'hybrimoe'"),
        (LAST.format(name="file_policy"), "hybrimoe:alpha=[", PolicyError, "is no value"),
    ],
)  # fmt: skip
def test_bad_files_and_texts_are_named(mine, source, text, error, message):
    mine.write_text(source)
    with pytest.raises(error, match=message):
        open_policy(text)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two installed packages with an entry point each; the module of one does not import."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "good_policies.py").write_text(LAST.format(name="installed_policy"))
    (tmp_path / "bad_policies.py").write_text("import nothing_of_that_name")
    points = [EntryPoint(name, f"{name}_policies", policies.GROUP) for name in ("bad", "good")]
    monkeypatch.setattr(policies, "entry_points", lambda group: points)
    load_entry_points.cache_clear()
    yield
    load_entry_points.cache_clear()


def test_a_preset_may_stream_prompts(mine):
    plain = resolve_policy(open_policy("mine.py").name)
    assert plain.streaming is None
    mine.write_text(
        LAST.format(name="file_policy").replace("balance='static'", "balance='static', streaming=Streaming(9)")
    )
    again = resolve_policy(open_policy("mine.py").name)
    assert again.streaming == extension.Streaming(9)


def test_an_entry_point_that_fails_leaves_the_others(packages):
    with pytest.warns(PolicyImportWarning, match="bad = bad_policies of .* cannot be imported: ModuleNotFoundError"):
        assert open_policy("installed_policy:weight=2").name == "installed_policy"
    with pytest.raises(PolicyError, match=r"(?s)unknown policy 'absent_policy'.*bad_policies"):
        open_policy("absent_policy")


def test_a_deployment_file_takes_them(mine):
    config = load_config({"scheduler": {"policy": "mine.py:weight=3", "prefetch": "none"}})
    assert resolved_policy(config.scheduler) == ("static/none/file_policy", {"weight": 3})
    for bad, message in (("gone.py", "no policy file"), ("mine.py:weight=x", "must be an integer")):
        with pytest.raises(ConfigError, match=f"scheduler.policy: .*{message}"):
            load_config({"scheduler": {"policy": bad}})


BREACHES = {
    "random": (
        "@policy('breach')\ndef f(costs: LayerCosts) -> Assignment:\n    n = len(costs)\n"
        "    order = np.random.permutation(n).tolist()\n    return Assignment(order, [])\n",
        "the same calls gave two plans",
    ),
    "twice": (
        "@policy('breach')\ndef f(costs: LayerCosts) -> Assignment:\n    return Assignment([0] * len(costs), [])\n",
        "every one of the",
    ),
    "writes": (
        "@policy('breach')\nclass C(CachePolicy):\n    def observe(self, demand):\n        demand.gate_scores[:] = 0\n",
        "changed the demand's gate_scores",
    ),
    "raises": (
        "@policy('breach')\nclass C(CachePolicy):\n    def refresh(self, layer):\n        raise KeyError('x')\n",
        "cache breach raised KeyError in refresh",
    ),
}


@pytest.mark.parametrize("kind", BREACHES)
def test_the_check_names_a_breach(mine, kind):
    source, message = BREACHES[kind]
    mine.write_text(HEAD + source)
    with pytest.raises(ContractError, match=f"(?s)(breach|mine.py).*{message}|{message}"):
        check_policy(open_policy("mine.py"))
    assert CliRunner().invoke(app, ["policy", "check", "mine.py"]).exit_code == 1


@pytest.mark.parametrize("name", ["ours", "hybrimoe", "oracle"])
def test_our_own_keep_the_contract(name):
    checked = check_policy(open_policy(name))
    assert checked.plans > 300
    assert checked.transfers > 0


def section() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.split("## Try a policy of your own")[1].split("\n## ")[0]


@pytest.mark.slow
def test_what_contributing_says_works(tmp_path, monkeypatch):
    """The file of the section is written, and each of its commands run."""
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", section(), re.DOTALL)
    commands = re.search(r"```sh\n(.*?)```", section(), re.DOTALL)
    assert code is not None
    assert commands is not None
    Path("mine.py").write_text(code[1], encoding="utf-8")
    for line in commands[1].splitlines():
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, f"{line}: {result.output}"
    assert "mine.py" in Path("mine/rows.csv").read_text(encoding="utf-8")
