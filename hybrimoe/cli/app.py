"""The `hybrimoe` program: finds the commands, loads the one that is asked for, turns errors into messages.

A command is a module `hybrimoe/cli/<name>.py` (`explain-step` lives in `explain_step.py`) with

    def register(app: typer.Typer) -> None:
        app.command("name")(function)            # or app.add_typer(sub_app, name="name")

and a line in `COMMANDS`. Only the module of the command that runs is imported, so `hybrimoe --help` needs neither
torch nor transformers; command modules keep their heavy imports inside functions all the same, for their own help.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from hybrimoe.cli.shared.libraries import collect_seldom
from hybrimoe.cli.views import render
from hybrimoe.cli.views.waiting import set_wait_policy
from hybrimoe.machine.bytecode import keep_bytecode

RUN, UNDERSTAND, MEASURE = "Run a model", "Understand what happens", "Measure and simulate"

# name -> (line of the help, panel of the help); in the order in which the help lists them
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("Stream the completion of one prompt, or run many in batches.", RUN),
    "chat": ("Talk with a model; the KV cache is kept from turn to turn.", RUN),
    "serve": ("Serve a model over an OpenAI-compatible HTTP API.", RUN),
    "ctl": ("Look at a running server, and change its slots, memory, policy and models.", RUN),
    "demo": ("Make a demo model that can hold a conversation.", RUN),
    "explain": ("Show which rule places which module where; reads no weights.", UNDERSTAND),
    "rules": ("Check a rule file, or print the JSON Schema of rule files.", UNDERSTAND),
    "inspect": ("Show what a checkpoint holds, and what packing its experts costs.", UNDERSTAND),
    "convert": ("Pack a model once into a folder that later starts map.", UNDERSTAND),
    "verify": ("Compare a converted model with its checksums.", UNDERSTAND),
    "plan": ("Show what fits: experts per tier, KV room, expected hit rate and speed.", UNDERSTAND),
    "explain-step": ("Explain the schedule of one step: lanes, critical path, idle time.", UNDERSTAND),
    "doctor": ("Say what works on this machine and what does not.", UNDERSTAND),
    "calibrate": ("Measure this machine into a hardware profile.", MEASURE),
    "trace": ("Record and analyse the expert routing of a model.", MEASURE),
    "simulate": ("Compare scheduling policies on a trace and a hardware profile.", MEASURE),
    "policy": ("List scheduling policies, or check one of your own.", MEASURE),
    "bench": ("Measure kernels, decoding, prefill, and policies side by side.", MEASURE),
}


def _module_of(command: str) -> str:
    return f"hybrimoe.cli.{command.replace('-', '_')}"


class LazyGroup(TyperGroup):
    """A command group which lists its commands from a table and imports only the one that is run."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, (line, panel) in COMMANDS.items():
            if importlib.util.find_spec(_module_of(name)) is not None:
                stub = TyperCommand(name, short_help=line, help=line, rich_help_panel=panel)
                self.commands.setdefault(name, stub)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The real command named by `args[0]`, loaded now; an unknown name is a usage error with a suggestion."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = load_command(name)
        return name, command, rest

    def main(self, args: Sequence[str] | None = None, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        """Run one command line. Every way a command can fail ends here, as one message and an exit code."""
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        debug = "--debug" in options or os.environ.get("HYBRIMOE_DEBUG", "") not in ("", "0")
        if "--debug" in options:
            words.remove("--debug")
        _open_closed_streams()
        _show_what_can_be_shown()
        try:
            result = super().main(words, standalone_mode=False, **extra)
            code = result if isinstance(result, int) else 0
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = 130
        except Exception as error:  # noqa: BLE001  # the last line of defence: a message, never a bare traceback
            code = report(error, as_json="--json" in options, debug=debug)
        if standalone_mode:
            sys.exit(code)
        return code


def _open_closed_streams() -> None:
    """A program that was started without one of stdin, stdout and stderr (`>&-`) reads nothing, and writes to nowhere;
    else the first file that it opens would stand in that place."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 # to the end


def _show_what_can_be_shown() -> None:
    """Characters that a stream cannot encode become `?`: they are no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def load_command(name: str) -> Any:
    """Import `hybrimoe.cli.<name>` and build its command."""
    module = importlib.import_module(_module_of(name))
    holder = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")
    module.register(holder)
    command = get_group(holder).commands[name]
    _bound_whole_numbers(command)
    return command


LARGEST, LARGEST_SEED = 2**31 - 1, 2**63 - 1
"""Of any whole number of a command line, and of a seed."""


def _bound_whole_numbers(command: Any) -> None:
    """Whole numbers beyond what anything here can be are wrong usage: some would overflow deep inside."""
    for leaf in getattr(command, "commands", {"": command}).values():
        for param in leaf.params:
            param.process_value = _bounded(param, param.process_value)


def _bounded(param: Any, process: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    largest = LARGEST_SEED if param.name == "seed" else LARGEST

    def checked(context: Any, given: Any) -> Any:
        value = process(context, given)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and number > largest:
                raise typer.BadParameter(f"{number} is too large; expected at most {largest}", context, param)
        return value

    return checked


def report(error: Exception, *, as_json: bool, debug: bool) -> int:
    """Show `error` as one message (a JSON document on stdout with `as_json`); returns the exit code.

    Errors of the command line parser, of HybriMoE's packages and of the operating system say all that a user needs;
    anything else is a defect of ours, and says so. With `debug` the traceback comes too, in every case.
    """
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        _silence_closed_pipe()
        return 1
    if debug:
        render.traceback_to_stderr(error)
    code = exit_code(error)
    is_usage = hasattr(error, "format_message")
    if as_json and _told_as_json(error, code):
        return code
    if is_usage:
        error.show()  # type: ignore[attr-defined]  # usage line, hint and message, from the parser
    else:
        render.error(_message(error))
    return code


def _told_as_json(error: Exception, code: int) -> bool:
    """False where stdout takes nothing, which may be what went wrong."""
    try:
        render.emit_json({"error": {"type": type(error).__name__, "message": _message(error), "exit_code": code}})
        sys.stdout.flush()
    except OSError:
        return False
    return True


def exit_code(error: BaseException) -> int:
    """The error class says its own (2 for wrong usage and configuration); without one it is 1."""
    return int(getattr(error, "exit_code", 1))


TORCH_HAS_NO_MEMORY = ("can't allocate memory", "not enough memory")
OUR_PACKAGES = ("hybrimoe", "cpu_kernels", "gpu_kernels", "scheduler", "yaml_rules")


def _message(error: Exception) -> str:
    if hasattr(error, "format_message"):
        return str(error.format_message())
    text = str(error).strip() or type(error).__name__
    if type(error).__module__.split(".")[0] in OUR_PACKAGES:
        return text
    if isinstance(error, FileNotFoundError) and error.filename is None and not _has_folder():
        return "the current folder is not there any more; change to one that is"
    if isinstance(error, OSError):
        return text if error.filename is not None or not error.strerror else error.strerror
    if isinstance(error, ImportError):
        from hybrimoe.compat import import_fault

        if fault := import_fault(error):
            return ": ".join(fault)
    if isinstance(error, MemoryError) or any(words in text for words in TORCH_HAS_NO_MEMORY):
        return f"out of memory: {text.splitlines()[0]}"
    if type(error).__name__ == "AcceleratorError" and type(error).__module__ == "torch":
        return (
            f"the accelerator has failed: {text.splitlines()[0]}\nStart again; with --accelerator none the CPU computes"
            " all. hybrimoe doctor looks at the device."
        )
    if isinstance(error, typer.Abort):
        return "aborted"
    return f"unexpected {type(error).__name__}: {text}\nThis is a defect of HybriMoE; --debug shows where it came from."


def _has_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _silence_closed_pipe() -> None:
    """The reader of our output has gone (`| head`): nothing can be said, and the exit must not try to flush."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("hybrimoe")
        except PackageNotFoundError:
            number = "(not installed; running from a source tree)"
        typer.echo(f"hybrimoe {number}")
        raise typer.Exit


app = typer.Typer(
    name="hybrimoe",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Mixture-of-Experts models with experts split between the CPU and an accelerator.",
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (anywhere on the line).")] = False,
) -> None:
    """Options of the program itself. Both act before a command runs: `main` reads --debug, a callback --version."""


def main() -> None:
    """The console entry point."""
    keep_bytecode()
    collect_seldom()
    set_wait_policy(sys.argv[1:])
    app()
