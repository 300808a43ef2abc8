"""Opens the model of a command: configuration, weights, tokenizer; quiet libraries, a bar on stderr while it loads."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.cli.common import writing
from hybrimoe.cli.libraries import import_libraries
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation import TextGenerator
    from hybrimoe.generation.context import ContextShift
    from hybrimoe.generation.prefix.blocks import PrefixTree
    from hybrimoe.generation.prefix.budget import PrefixSettings
    from hybrimoe.server.slots import SlotFiles

Progress = Callable[[int, int, str], None]
KEEP_SECONDS = 5.0
"""Time at the end of a command for what is to be kept on disk."""
BUDGETS = ("gpu_experts", "host", "disk", "kv")
"""Of the section `memory`: sizes, which change where something lies and not what it is."""


@dataclass(slots=True)
class OpenModel:
    """A model that is ready to reply, its session (None where nothing was injected), and what it was opened from."""

    generator: TextGenerator
    session: Any
    name: str
    config: DeployConfig

    def stats(self) -> dict[str, Any] | None:
        """The session's counters since the last `reset_stats`, as plain data."""
        return None if self.session is None else dict(self.session.stats().as_dict())

    def reset_stats(self) -> None:
        """Start counting anew; the slots keep what they hold."""
        if self.session is not None:
            self.session.reset_stats()

    def close(self) -> None:
        """Stop the session's lanes."""
        if self.session is not None:
            self.session.close()


@contextmanager
def open_model(
    config: DeployConfig, *, show_progress: bool = True, told: Progress = lambda done, total, what: None
) -> Iterator[OpenModel]:
    """Load the model of `config`; its lanes stop when the block ends. told: called, as a bar is, with how far it is."""
    import_libraries()
    quiet_libraries()
    from hybrimoe.checkpoint import load, load_tokenizer, model_path
    from hybrimoe.checkpoint.source import read_config_dict
    from hybrimoe.generation import TextGenerator
    from hybrimoe.generation.images.vision import Vision
    from hybrimoe.generation.kv_memory import kv_budget_bytes

    read_config_dict(model_path(config.model))  # no model is a clearer message than no tokenizer
    tokenizer = load_tokenizer(config.model)
    with progress_bar(show_progress) as progress, warnings_as_notes():

        def progressed(done: int, total: int, what: str) -> None:
            progress(done, total, what)
            told(done, total, what)

        model = load(config.model, config=config, progress=progressed)
    if show_progress and model.hybrimoe.packing is not None:
        render.note(f"note: {model.hybrimoe.packing}")
    try:
        with warnings_as_notes():
            kv_bytes = kv_budget_bytes(model, config.memory.kv)
            generator = TextGenerator(
                model, tokenizer, kv_bytes=kv_bytes, speculate=config.generation.speculate,
                shift=_shift(config), vision=Vision(model, tokenizer, model_path(config.model)),
            )  # fmt: skip
        yield OpenModel(generator, model.hybrimoe.session, "demo" if config.model is None else config.model, config)
    finally:
        model.hybrimoe.session.close()


def prefix_settings(config: DeployConfig) -> PrefixSettings:
    """Where a deployment keeps what prompts and replies computed."""
    from cpu_kernels.jit.cache_dir import cache_home
    from hybrimoe.generation.prefix.budget import DiskSettings, PrefixSettings

    server = config.server
    if server.prefix_cache_disk.kind == "none":
        return PrefixSettings(server.prefix_cache)
    folder = Path(server.prefix_cache_folder or cache_home() / "prefixes").expanduser()
    return PrefixSettings(server.prefix_cache, DiskSettings(folder, server.prefix_cache_disk, states_identity(config)))


def slot_files(name: str, config: DeployConfig) -> SlotFiles | None:
    """Where a server saves slots of its model `name`; None where the deployment names no folder."""
    from hybrimoe.server.slots import SlotFiles

    if config.server.slot_save_path is None:
        return None
    return SlotFiles(Path(config.server.slot_save_path).expanduser(), states_identity(config), name)


@contextmanager
def kept_prefixes(opened: OpenModel, *, on_disk_only: bool = False) -> Iterator[PrefixTree | None]:
    """The prefix cache of an open model; what is not on disk yet gets there when the block ends.

    on_disk_only: none without a disk level, for whoever has one prompt.
    """
    from hybrimoe.generation.prefix.budget import prefix_tree

    generator, settings = opened.generator, prefix_settings(opened.config)
    if on_disk_only and settings.disk is None:
        yield None
        return
    tree = prefix_tree(generator.model, settings, generator.kv_bytes or 0)
    try:
        yield tree
    finally:
        if tree is not None:
            tree.close(KEEP_SECONDS)


def states_identity(config: DeployConfig, **more: Any) -> str:
    """A hash of all that the keys and values of a text depend on, in a model as it runs here: its weights, and how they
    are stored and computed. Budgets, policies that lose nothing, and the server's settings do not count.

    more: further things that count, as JSON takes them.
    """
    import torch
    import transformers

    from hybrimoe.checkpoint.adapters.settings import CONFIG_NAME, WEIGHTS_NAME, adapter_folder
    from hybrimoe.checkpoint.source import model_path, read_config_dict
    from hybrimoe.checkpoint.weights import weight_stamps
    from hybrimoe.compat import PROCESSOR_FILES
    from hybrimoe.config.adapters import parse_adapter
    from hybrimoe.generation.saved.sessions import identity_of

    path = model_path(config.model)
    adapters = [adapter_folder(parse_adapter(adapter)) for adapter in config.adapters]
    small = [path / name for name in PROCESSOR_FILES]
    small += [folder / name for folder in adapters for name in (CONFIG_NAME, WEIGHTS_NAME)]
    small += [Path(config.rules).expanduser()] if isinstance(config.rules, str) else []
    deployment = {key: value for key, value in config.as_dict().items() if key not in ("server", "generation", "model")}
    deployment["memory"] = {key: value for key, value in deployment["memory"].items() if key not in BUDGETS}
    deployment["scheduler"] = deployment["scheduler"].get("lossy")
    return identity_of(
        {
            "config": read_config_dict(path),
            "weights": weight_stamps(path),
            "files": [_sha256(file) for file in small if file.is_file()],
            "deployment": deployment,
            "versions": [torch.__version__, transformers.__version__],
            **more,
        }
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _shift(config: DeployConfig) -> ContextShift | None:
    """What is left out of texts that outgrow the context, as the deployment says."""
    from hybrimoe.generation.context import ContextShift

    settings = config.generation
    if not settings.context_shift:
        return None
    return ContextShift() if settings.attention_sinks is None else ContextShift(settings.attention_sinks)


def quiet_libraries() -> None:
    """No progress bars and no remarks of transformers: what a user must know, HybriMoE says itself."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Warnings of the block become notes on stderr, without file names and source lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        render.note(f"note: {text}")


@contextmanager
def progress_bar(
    shown: bool = True, beginning: str = "starting (the first start compiles kernels)"
) -> Iterator[Progress]:
    """A bar on stderr that a loader moves by `progress(done, total, what)`; nothing where stderr is no terminal."""
    console = render.err()
    if not shown or not console.is_terminal:
        yield lambda done, total, what: None
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}
        begin = bar.add_task(beginning, total=None)

        def move(done: int, total: int, what: str) -> None:
            bar.update(begin, visible=False)
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield move


def write_trace(path: Path, records: list[Any], label: str) -> None:
    """Write a Chrome/Perfetto trace. Raises FileError, with the path, where it cannot be written."""
    import json

    from scheduler.graph.export import chrome_trace

    with writing(path):
        path.write_text(json.dumps(chrome_trace(records, label)), encoding="utf-8")


def stream_out(pieces: Iterator[str] | Any) -> None:
    """Write text to stdout as it comes."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
