"""The program around the commands: help without heavy imports, errors as one message, exit codes."""

import errno
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import typing

import pytest
import torch
import typer

from hybrimoe.cli import app as app_module
from hybrimoe.errors import ConfigError, ModelError


@pytest.fixture
def failing(hybrimoe, monkeypatch):
    """Makes `hybrimoe generate` raise what it is given, and runs it."""

    def run(error, *words):
        holder = typer.Typer()

        @holder.callback()
        def group():
            pass

        @holder.command("generate")
        def generate(as_json: bool = typer.Option(False, "--json")):
            raise error

        command = typer.main.get_group(holder).commands["generate"]
        monkeypatch.setattr(app_module, "load_command", lambda name: command)
        return hybrimoe("generate", *words)

    return run


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys, hybrimoe.cli.app as a\n"
        "a.app(['--help'], standalone_mode=False)\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'numba', 'scipy', 'networkx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert "HEAVY []" in done.stdout
    for name in app_module.COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", app_module.COMMANDS)
def test_every_command_registers_under_its_name_and_has_help_and_json(hybrimoe, name):
    shown = hybrimoe(name, "--help")
    assert shown.code == 0, shown.err
    assert name in shown.out
    command = app_module.load_command(name)
    for leaf in leaves_of(command):
        options = [option for parameter in leaf.params for option in parameter.opts]
        assert "--json" in options, f"{name} {leaf.name} has no --json"


def leaves_of(command):
    return [leaf for inner in getattr(command, "commands", {}).values() for leaf in leaves_of(inner)] or [command]


@pytest.mark.parametrize("name", app_module.COMMANDS)
def test_no_option_of_a_command_has_the_letter_of_another(name):
    for leaf in leaves_of(app_module.load_command(name)):
        words = [word for parameter in leaf.params for word in (*parameter.opts, *parameter.secondary_opts)]
        assert len(words) == len(set(words)), f"{name} {leaf.name} has one of these twice: {sorted(words)}"


def test_an_unknown_command_suggests_the_nearest_one(hybrimoe):
    result = hybrimoe("genrate")
    assert result.code == 2
    assert "generate" in result.err
    assert result.out == ""
    as_json = hybrimoe("genrate", "--json")
    assert as_json.code == 2
    assert "generate" in as_json.data["error"]["message"]


def test_an_unknown_option_is_wrong_usage(hybrimoe):
    result = hybrimoe("generate", "--promt", "x")
    assert result.code == 2
    assert "--prompt" in result.err
    assert "Traceback" not in result.err


@pytest.mark.skipif(sys.platform == "win32", reason="a folder that is in use cannot be removed")
def test_a_current_folder_that_is_gone(failing, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = failing(FileNotFoundError(errno.ENOENT, "No such file or directory"))
    assert result.code == 1
    assert "the current folder is not there any more" in result.err


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_program_that_is_started_without_a_stream(closed):
    """`rules list` writes, and the file that it reads must not stand in the place of a stream."""
    command = f"{sys.executable} -m hybrimoe rules list {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("words", ["rules list", "rules list --json", "verify nowhere --json"])
def test_a_stdout_that_takes_nothing(words):
    command = f"{sys.executable} -m hybrimoe {words} > /dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: (No space left on device|nowhere is no pack.*)\n", done.stderr)


def test_version(hybrimoe):
    result = hybrimoe("--version")
    assert result.code == 0
    assert result.out.startswith("hybrimoe ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("no experts in [here]"), 1),
        (ConfigError("no experts in [here]"), 2),
        (FileNotFoundError(errno.ENOENT, "no experts in [here]"), 1),
        (MemoryError("no experts in [here]"), 1),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(failing, error, code):
    result = failing(error)
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert "no experts in [here]" in result.err
    assert "defect" not in result.err
    assert "Traceback" not in result.err


def test_with_json_an_error_is_a_json_document_on_stdout(failing):
    result = failing(ModelError("no experts"), "--json")
    assert result.code == 1
    assert result.data == {"error": {"type": "ModelError", "message": "no experts", "exit_code": 1}}
    assert result.err == ""


def test_an_unexpected_error_says_so_and_debug_shows_where_it_came_from(failing, monkeypatch):
    short = failing(ZeroDivisionError("division by zero"))
    assert short.code == 1
    assert "unexpected ZeroDivisionError: division by zero" in short.err
    assert "--debug" in short.err
    assert "Traceback" not in short.err
    assert "Traceback" in failing(ZeroDivisionError("x"), "--debug").err
    monkeypatch.setenv("HYBRIMOE_DEBUG", "1")
    assert "Traceback" in failing(ZeroDivisionError("x")).err


def test_ctrl_c_is_exit_code_130(failing):
    result = failing(KeyboardInterrupt())
    assert result.code == 130
    assert "Traceback" not in result.err


def test_a_closed_pipe_is_no_error_message():
    command = f"{sys.executable} -m hybrimoe --help | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600, check=False)
    assert done.stderr == ""


def test_completion_knows_the_commands(monkeypatch):
    env = {
        "_HYBRIMOE_COMPLETE": "complete_bash",
        "COMP_WORDS": "hybrimoe gen",
        "COMP_CWORD": "1",
        "PATH": "/usr/bin:/bin",
    }
    code = "from hybrimoe.cli.app import app; app(prog_name='hybrimoe')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=env, check=False
    )
    assert done.stdout.split() == ["generate"]


def test_the_benchmarks_of_the_package_are_commands(hybrimoe):
    import pkgutil

    from hybrimoe.cli import bench

    names = {found.name for found in pkgutil.iter_modules(bench.__path__)} - set(bench.SHARED)
    shown = hybrimoe("bench", "--help").out
    for name in names:
        assert callable(importlib.import_module(f"hybrimoe.cli.bench.{name}").register)
        assert name.replace("_", "-") in shown


def test_json_keeps_number_lists_on_one_line_and_leaves_text_alone(capsys):
    from hybrimoe.cli.views.render import emit_json

    data = {"ids": [1, -2, 3.5e-7], "text": "a [\n 1,\n 2\n] b [ 1, 2 ]", "empty": [], "nested": [[1], [2, 3]]}
    emit_json(data)
    text = capsys.readouterr().out
    assert json.loads(text) == data
    assert "[1, -2, 3.5e-07]" in text


def numeric_options(numbers=r"\bint\b|\bfloat\b"):
    """Every option and argument of every command that takes a number: the words in front of it, and how it is named."""
    for name in app_module.COMMANDS:
        command = app_module.load_command(name)
        for leaf, found in getattr(command, "commands", {"": command}).items():
            types = typing.get_type_hints(inspect.unwrap(found.callback))
            for option in found.params:
                if re.search(numbers, str(types[option.name])):
                    is_argument = option.param_type_name == "argument"
                    marker, named = ("--", f"'{option.metavar}'") if is_argument else (option.opts[0], option.opts[0])
                    yield pytest.param([word for word in (name, leaf, marker) if word], named)


@pytest.mark.parametrize(("words", "named"), list(numeric_options()))
def test_a_number_that_cannot_be_meant_is_wrong_usage(hybrimoe, words, named):
    result = hybrimoe(*words, "-7", stdin="a prompt")
    assert result.code == 2
    assert re.search(named.strip("-").replace("-", "[ _-]"), result.err)


@pytest.mark.parametrize(("words", "named"), list(numeric_options(r"\bint\b")))
def test_a_whole_number_beyond_all_measure_is_wrong_usage(hybrimoe, words, named):
    result = hybrimoe(*words, "9" * 23, stdin="a prompt")
    assert result.code == 2
    assert re.search(named.strip("-").replace("-", "[ _-]"), result.err)


def test_a_device_that_failed_is_no_defect():
    error = torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")
    said = app_module._message(error)
    assert said.startswith("the accelerator has failed: CUDA error: unspecified launch failure\n")
    assert "--accelerator none" in said
    assert "DSA" not in said


def test_memory_that_torch_does_not_get_is_no_defect():
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes.\nframe #0: _start")
    assert app_module._message(error).startswith("out of memory: ")
    assert "frame" not in app_module._message(error)


def test_no_processes_at_all_are_wrong_usage(hybrimoe, tmp_path):
    result = hybrimoe("bench", "ablation", "--jobs", "0", "--out", str(tmp_path))
    assert result.code == 2
    assert "expected 1 or more processes" in result.err
    assert not any(tmp_path.iterdir())
