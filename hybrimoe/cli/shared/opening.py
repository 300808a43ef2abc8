"""Opens the model of a command: configuration, weights, tokenizer; quiet libraries, a bar on stderr while it loads."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.cli.shared.libraries import import_libraries
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation import TextGenerator
    from hybrimoe.generation.context import ContextShift

Progress = Callable[[int, int, str], None]


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


def stream_out(pieces: Iterator[str] | Any) -> None:
    """Write text to stdout as it comes."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
