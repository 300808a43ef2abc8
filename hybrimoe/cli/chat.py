"""`hybrimoe chat`: a conversation in the terminal or over a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.shared.groups import PlacementGroup, PrefixGroup, SamplingGroup, grouped
from hybrimoe.cli.shared.libraries import import_libraries
from hybrimoe.cli.shared.options import OUTPUT, FitOption, ModelArgument, ProfileOption
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.cli.chatting.models import Opened
    from hybrimoe.cli.shared.opening import OpenModel
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation.saved.sessions import Session

SESSIONS = "Sessions"


def register(app: typer.Typer) -> None:
    """Add `chat`."""
    app.command("chat")(grouped(chat))


def chat(
    *,
    model: ModelArgument = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="A system message.")] = None,
    session: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Go on with the conversation of that name, or begin it.", rich_help_panel=SESSIONS
        ),
    ] = None,
    list_sessions: Annotated[
        bool, typer.Option("--list-sessions", help="The names of all, and nothing else.", rich_help_panel=SESSIONS)
    ] = False,
    delete_session: Annotated[
        str | None, typer.Option(metavar="NAME", help="Delete one, and nothing else.", rich_help_panel=SESSIONS)
    ] = None,
    models: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Models of a folder to go on with; /models lists them.")
    ] = None,
    sampling: SamplingGroup,
    prefixes: PrefixGroup,
    placement: PlacementGroup,
    fit: FitOption = False,
    profile: ProfileOption = False,
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown/--no-markdown",
            help="Draw replies as Markdown in a terminal, or as they are (on).",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only replies.", rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for each reply.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Talk with a model. Enter sends a message; Alt-Enter, or a backslash at the end of a line, begins a new line.

    Arrow keys edit and bring earlier messages back; what is pasted is one message. Ctrl-C stops a reply; Ctrl-D or
    /exit leaves. In a pipe a line is a message; the exit code is 1 where none was answered.

    What an earlier message, an earlier branch of the conversation or another one computed is not computed again, as far
    as --prefix-cache goes; with --prefix-cache-disk not in a later chat, either.

    Commands: /retry, /edit TEXT, /undo, /clear, /system TEXT, /image FILE, /save FILE, /load FILE, /set NAME VALUE,
    /stats, /timeline, /models [NAME]; /help says what they do.
    """
    from hybrimoe.generation.saved.sessions import Session, session_names

    if list_sessions or delete_session is not None:
        if delete_session is not None:
            Session(sessions_folder(), delete_session).delete()
        names = session_names(sessions_folder())
        if as_json:
            render.emit_json({"sessions": names})
        elif list_sessions:
            render.out().print("\n".join(names) or "no sessions", markup=False)
        return
    options = sampling.options()
    kept = None if session is None else Session(sessions_folder(), session)
    if kept is not None and system is not None and session in session_names(sessions_folder()):
        raise typer.BadParameter(
            f"the session {session} has begun with its own system message; leave --system out, or use /system in the"
            " chat"
        )
    deployment = prefixes.over(placement.deployment(model))
    if models is not None:
        deployment = deployment.model_copy(update={"server": deployment.server.model_copy(update={"models": models})})
    import_libraries()
    from hybrimoe.server.shelf import deployments

    shelf = deployments(deployment)
    from hybrimoe.cli.chatting.answering import Chat
    from hybrimoe.cli.chatting.loop import ChatLoop
    from hybrimoe.cli.chatting.models import ChatModels

    with ChatModels(shelf, partial(opened_for_chat, system=system, kept=kept, fit=fit, quiet=quiet)) as choice:
        opened = choice.open(next(iter(shelf)))
        take_up(opened, quiet=quiet)
        talk = Chat(
            opened.model, opened.conversation, options, session=opened.session, profiled=profile, quiet=quiet,
            as_json=as_json, markdown=markdown, models=choice,
        )  # fmt: skip
        try:
            ChatLoop(talk).run()
        finally:
            if talk.session is not None:
                talk.session.save_states(talk.conversation)


@contextlib.contextmanager
def opened_for_chat(
    deployment: DeployConfig, *, system: str | None, kept: Session | None, fit: bool, quiet: bool
) -> Iterator[Opened]:
    """A model in memory, a new conversation with it, and the session with this model's states. fit: with what fits."""
    from hybrimoe.cli.chatting.models import Opened
    from hybrimoe.cli.shared.opening import open_model
    from hybrimoe.cli.shared.states import kept_prefixes
    from hybrimoe.generation import Conversation

    if fit:
        from hybrimoe.cli.shared.fitting import fitted

        deployment = fitted(deployment, told=not quiet)
    with open_model(deployment, show_progress=not quiet) as opened, kept_prefixes(opened) as tree:
        session = None if kept is None else replace(kept, identity=identity(opened))
        yield Opened(opened, Conversation(opened.generator, system=system, prefixes=tree), session)


NO_STATES = ("server", "generation")
"""Sections of a deployment on which keys and values do not depend."""


def sessions_folder() -> Path:
    """Where conversations are kept by name."""
    from cpu_kernels.jit.cache_dir import cache_home

    return cache_home() / "sessions"


def identity(opened: OpenModel) -> str:
    """Of the model as it runs here: a conversation's states are those of this one only."""
    from hybrimoe.cli.shared.states import states_identity

    deployment = {key: value for key, value in opened.config.as_dict().items() if key not in NO_STATES}
    template = getattr(opened.generator.tokenizer, "chat_template", None)
    return states_identity(opened.config, template=template, exactly=deployment)


def take_up(opened: Opened, *, quiet: bool) -> None:
    """Restore a session, and say what that means for the next reply."""
    session, conversation = opened.session, opened.conversation
    if session is None:
        return
    reason = session.restore(conversation)
    if quiet or not conversation.n_turns:
        return
    turns = f"{conversation.n_turns} message" + "s" * (conversation.n_turns > 1)
    computed = "" if reason is None else f"; the next reply computes them again: {reason}"
    render.note(f"session {session.name}: {turns} of yours so far{computed}")
