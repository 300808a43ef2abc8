"""`hybrimoe generate`: one prompt, its completion as a stream, then what it cost; or many in batches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli.shared.files import check_readable, check_writable
from hybrimoe.cli.shared.groups import PlacementGroup, PrefixGroup, SamplingGroup, grouped
from hybrimoe.cli.shared.options import (
    BATCHES,
    OUTPUT,
    FitOption,
    JsonOption,
    ModelArgument,
    ProfileOption,
    TimelineOption,
    TraceOption,
)
from hybrimoe.cli.views import render
from hybrimoe.text_files import MARK, read_text, require_text

if TYPE_CHECKING:
    from hybrimoe.cli.shared.opening import OpenModel
    from hybrimoe.generation import Reply, SamplingOptions, TextGenerator
    from hybrimoe.generation.kv_cache import PrefixCache

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended, as shells have it (128 + SIGINT)."""


def register(app: typer.Typer) -> None:
    """Add `generate`."""
    app.command("generate")(grouped(generate))


def generate(
    *,
    model: ModelArgument = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="Read the prompt from a file; - is stdin.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="An image that the prompt is about, for a model that sees; may be repeated.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Many prompts: one a line, or .jsonl; - is stdin. Prints JSON Lines.",
            rich_help_panel=BATCHES,
        ),
    ] = None,
    batching: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Which prompts run together: none (as they come), expertflow (like routes), moe-lightning (sized by "
            "the hardware). All lossless. Default: none.",
            rich_help_panel=BATCHES,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Prompts at once; for moe-lightning at most so many. Default: 8; its own plan.",
            rich_help_panel=BATCHES,
        ),
    ] = None,
    route_predictor: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For expertflow: a net of `hybrimoe trace train --target routes`. Default: a prefill of all prompts.",
            rich_help_panel=BATCHES,
        ),
    ] = None,
    sampling: SamplingGroup,
    prefixes: PrefixGroup,
    placement: PlacementGroup,
    fit: FitOption = False,
    timeline: TimelineOption = False,
    trace: TraceOption = None,
    profile: ProfileOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the text.", rich_help_panel=OUTPUT)] = False,
    as_json: JsonOption = False,
) -> None:
    """Stream the completion of one prompt, then say how fast it was and what each lane did.

    The prompt comes from --prompt, --prompt-file or stdin. Text goes to stdout, everything else to stderr. Ctrl-C ends
    the text; the summary of what there is still follows.

    With --image the prompt is a question about the images, in the model's chat template; a prompt in which the model's
    own placeholders for images stand, one for each, is taken as it is.

    With --prompts many prompts run in padded batches. Each gives a line of JSON on stdout, in the order of the file;
    Ctrl-C keeps those that have ended. With --batch-size 1 a prompt takes from the prefix cache what it has alike with
    an earlier one; with --prefix-cache-disk so does the prompt of a later call.
    """
    if prompts is None and not (batching is None and batch_size is None and route_predictor is None):
        raise typer.BadParameter(
            "--batching, --batch-size and --route-predictor are for many prompts: give --prompts FILE"
        )
    single = prompt is not None or prompt_file is not None or timeline or trace is not None or profile or image
    if prompts is not None and single:
        raise typer.BadParameter(
            "--prompts does not go with --prompt, --prompt-file, --image, --timeline, --trace, --profile"
        )
    if prompts is not None and placement.context_shift:
        raise typer.BadParameter("--context-shift is for single replies: batches of prompts end at the context")
    text = read_prompt(prompt, prompt_file) if prompts is None else read_file(prompts)
    options = sampling.options()
    check_readable(route_predictor)
    for file in image or []:
        check_readable(file)
    check_writable(trace)
    deployment = prefixes.over(placement.deployment(model))
    if fit:
        from hybrimoe.cli.shared.fitting import fitted

        deployment = fitted(deployment, told=not quiet)
    if prompts is not None:
        from hybrimoe.cli import generate_batch

        job = generate_batch.JobOptions(str(prompts), batching or "none", batch_size, quiet, as_json, route_predictor)
        if generate_batch.run(deployment, text, options, job):
            raise typer.Exit(INTERRUPTED)
        return
    from hybrimoe.cli.shared.opening import open_model
    from hybrimoe.cli.shared.states import kept_prefixes
    from hybrimoe.generation import interruptible
    from hybrimoe.generation.kv_cache import PrefixCache

    with open_model(deployment, show_progress=not quiet) as opened, interruptible() as interrupt:
        record = timeline or trace is not None
        with kept_prefixes(opened, on_disk_only=True) as tree:
            cache = PrefixCache(opened.generator.model, tree)
            reply = run(
                opened, text, options, interrupt, cache, images=image or [], record=record, echo=not as_json,
                profiled=profile,
            )  # fmt: skip
        report(opened, reply, timeline=timeline, trace=trace, quiet=quiet, as_json=as_json)
    if interrupt.pressed:
        raise typer.Exit(INTERRUPTED)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from the one place where it was given. A last line end is the end of the file, not of the prompt.

    Raises:
        typer.BadParameter: given twice, or not at all with a terminal on stdin.
        PromptError: it is empty, or no UTF-8 text.
    """
    from hybrimoe.errors import PromptError

    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give --prompt or --prompt-file, not both")
    text = prompt if prompt is not None else read_file(prompt_file).removesuffix("\n")
    if not text.strip():
        raise PromptError("the prompt is empty: expected some text to continue")
    require_text(text, "the prompt")
    return text


def read_file(path: Path | None) -> str:
    """The text of a file; `-` and None are stdin. Raises PromptError where it cannot be read or is no UTF-8 text."""
    from hybrimoe.errors import PromptError

    if path is None and sys.stdin.isatty():
        raise typer.BadParameter('no prompt: give --prompt "some text", --prompt-file FILE, or text on stdin')
    try:
        return sys.stdin.read().removeprefix(MARK) if path is None or str(path) == "-" else read_text(path)
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt in {path or 'stdin'} is no UTF-8 text: {error}") from error
    except OSError as error:
        raise PromptError(f"cannot read {path} ({error.strerror}): expected a text file, or - for stdin") from error


def run(
    opened: OpenModel, text: str, options: SamplingOptions, interrupt: Any, cache: PrefixCache, *,
    images: Sequence[Path] = (), record: bool, echo: bool, profiled: bool,
) -> Reply:  # fmt: skip
    """Generate; the text is written to stdout as it comes where `echo` is set."""
    from hybrimoe.cli.shared.opening import stream_out
    from hybrimoe.generation import Profile
    from hybrimoe.generation.sampling import COMPLETION_TOKENS, with_length

    prompt_ids = with_images(opened.generator, text, images) if images else opened.generator.encode(text)
    options = with_length(options, opened.generator.model, COMPLETION_TOKENS)
    profile = Profile(opened.generator.model) if profiled else None
    reply = opened.generator.reply(prompt_ids, options, cache=cache, should_stop=interrupt, profile=profile)
    opened.reset_stats()
    if record and opened.session is not None:
        opened.session.record_timeline(True)
    if echo:
        stream_out(reply)
        stream_out(["\n"])
    else:
        "".join(reply)
    return reply


def with_images(generator: TextGenerator, text: str, files: Sequence[Path]) -> list[int]:
    """Token ids of a prompt about images. Raises FileError, PromptError where they cannot be read or are not taken."""
    from hybrimoe.generation.chat import encode_chat, require_vision
    from hybrimoe.generation.images.messages import with_images as content
    from hybrimoe.generation.images.reading import read_image_file

    vision = require_vision(generator.vision)
    images = [read_image_file(file) for file in files]
    if vision.n_places(text) == len(images):
        return vision.encode(text, images, generator.encode)
    messages = [{"role": "user", "content": content(text, images)}]
    return encode_chat(generator.tokenizer, messages, vision=vision)


def report(opened: OpenModel, reply: Reply, *, timeline: bool, trace: Path | None, quiet: bool, as_json: bool) -> None:
    """The summary, the timeline, the profile and the trace file of one reply."""
    from hybrimoe.cli.shared.files import write_trace
    from hybrimoe.cli.views import render_summary

    experts = opened.stats()
    records = list(opened.session.timeline) if (timeline or trace) and opened.session is not None else []
    label = render_summary.provenance(experts)
    result = {"model": opened.name, **render_summary.reply_as_dict(reply, experts), "provenance": label}
    if trace is not None:
        write_trace(trace, records, f"hybrimoe generate {opened.name} ({label})")
    if as_json:
        render.emit_json(result | ({"timeline": records} if timeline else {}) | {"config": opened.config.as_dict()})
        return
    console = render.err()
    if timeline:
        from hybrimoe.cli.views.render_timeline import timeline as draw

        console.print(draw(records, label=label, width=console.width))
    if reply.profile is not None:
        from hybrimoe.cli.views.render_profile import profile_table

        console.print(profile_table(reply.profile.as_dict(), label))
    if not quiet:
        console.print(render_summary.summary(result), style="dim")
    if trace is not None and not quiet:
        render.note(f"trace    {trace} (open it at https://ui.perfetto.dev)")
