"""`hybrimoe chat`: a conversation in the terminal or over a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli import common
from hybrimoe.cli.messages import messages
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.cli.common_model import OpenModel
    from hybrimoe.generation import Conversation, SamplingOptions
    from hybrimoe.generation.sessions import Session

FAILED, INTERRUPTED = 1, 130
SESSIONS = "Sessions"


def register(app: typer.Typer) -> None:
    """Add `chat`."""
    app.command("chat")(common.grouped(chat))


def chat(
    *,
    model: common.ModelArgument = None,
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
    sampling: common.SamplingGroup,
    placement: common.PlacementGroup,
    profile: common.ProfileOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only replies.", rich_help_panel=common.OUTPUT)] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for each reply.", rich_help_panel=common.OUTPUT)
    ] = False,
) -> None:
    """Talk with a model. Enter sends a message; Alt-Enter, or a backslash at the end of a line, begins a new line.

    Arrow keys edit and bring earlier messages back; what is pasted is one message. /help lists the commands. Ctrl-C
    stops a reply; Ctrl-D or /exit leaves. In a pipe a line is a message; the exit code is 1 where none was answered.
    """
    from hybrimoe.generation.sessions import Session, session_names

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
        raise typer.BadParameter(f"the session {session} has begun with its own system message; leave --system out")
    deployment = placement.deployment(model)
    from hybrimoe.cli.common_model import open_model
    from hybrimoe.generation import Conversation

    with open_model(deployment, show_progress=not quiet) as opened:
        conversation = Conversation(opened.generator, system=system)
        if kept is not None:
            kept = Session(kept.folder, kept.name, identity(opened))
            take_up(kept, conversation, quiet=quiet)
        loop = ChatLoop(
            opened, conversation, options, session=kept, profiled=profile, quiet=quiet, as_json=as_json
        )  # fmt: skip
        try:
            loop.run()
        finally:
            if kept is not None:
                kept.save_states(conversation)


def sessions_folder() -> Path:
    """Where conversations are kept by name."""
    from cpu_kernels.jit.cache_dir import cache_home

    return cache_home() / "sessions"


def identity(opened: OpenModel) -> str:
    """Of the model as it runs here: a conversation's states are those of this one only."""
    import torch

    from hybrimoe.checkpoint.source import model_path, read_config_dict
    from hybrimoe.generation.sessions import identity_of

    path = model_path(opened.config.model)
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    weights = [file for file in files if file.suffix in (".safetensors", ".gguf")]
    return identity_of(
        {
            "config": read_config_dict(path),
            "weights": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights],
            "template": getattr(opened.generator.tokenizer, "chat_template", None),
            "deployment": {key: value for key, value in opened.config.as_dict().items() if key != "server"},
            "torch": torch.__version__,
        }
    )


def take_up(session: Session, conversation: Conversation, *, quiet: bool) -> None:
    """Restore a session, and say what that means for the next reply."""
    reason = session.restore(conversation)
    if quiet or not conversation.n_turns:
        return
    turns = f"{conversation.n_turns} message" + "s" * (conversation.n_turns > 1)
    computed = "" if reason is None else f"; the next reply computes them again: {reason}"
    render.note(f"session {session.name}: {turns} of yours so far{computed}")


class ChatLoop:
    """Reads messages and commands until their end; nothing that goes wrong with a message ends the loop."""

    def __init__(
        self, opened: OpenModel, conversation: Conversation, options: SamplingOptions, *, session: Session | None,
        profiled: bool, quiet: bool, as_json: bool,
    ) -> None:  # fmt: skip
        self.opened = opened
        self.conversation = conversation
        self.options = options
        self.session = session
        self.profiled = profiled
        self.quiet = quiet
        self.as_json = as_json
        self.at_terminal = sys.stdin.isatty() and not as_json
        self.messages = messages(self.at_terminal)
        self.n_failed = 0
        self.last: dict[str, Any] | None = None
        self.commands: dict[str, tuple[str, Callable[[], bool]]] = {
            "/help": ("list the commands", self._help),
            "/reset": ("forget the conversation", self._reset),
            "/stats": ("speed, cache and lanes of the last reply", self._stats),
            "/timeline": ("draw what each lane did in the last reply", self._timeline),
            "/exit": ("leave (so does Ctrl-D)", lambda: False),
        }

    def run(self) -> None:
        """The loop. Raises typer.Exit(130) when Ctrl-C is pressed twice while it waits for a message, Exit(1) at the
        end of a pipe of which no message could be answered."""
        self._greet()
        presses = 0
        while True:
            try:
                message = self.messages.read()
            except KeyboardInterrupt:
                presses += 1
                if presses > 1 or not self.at_terminal:
                    raise typer.Exit(INTERRUPTED) from None
                render.note("\npress Ctrl-C again to leave")
                continue
            presses = 0
            if message is None or not self._handle(message):
                break
        if self.n_failed and self.last is None and not self.at_terminal:
            raise typer.Exit(FAILED)

    def _greet(self) -> None:
        if self.quiet:
            return
        if not self.conversation.has_template:
            render.note("this model has no chat template: the conversation is given to it as a plain transcript")
        if self.at_terminal:
            render.note(f"{self.opened.name}; /help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")

    def _handle(self, message: str) -> bool:
        """Answer a message or do a command; False ends the loop."""
        if not message.strip():
            return True
        word = message.split()[0]
        if word in self.commands:
            return self.commands[word][1]()
        if word.startswith("/") and "/" not in word[1:] and len(message.split()) == 1:
            return self._unknown(word)
        try:
            self._answer(message)
        except Exception as error:  # noqa: BLE001  # it belongs to the message: the conversation goes on
            self._failed(error)
        return True

    def _failed(self, error: Exception) -> None:
        from hybrimoe.errors import HybriMoEError

        self.n_failed += 1
        said = str(error) if isinstance(error, HybriMoEError) else f"unexpected {type(error).__name__}: {error}"
        if self.as_json:
            self._emit({"error": {"type": type(error).__name__, "message": said}})
        else:
            render.error(said)

    def _answer(self, message: str) -> None:
        from hybrimoe.cli.common_model import stream_out
        from hybrimoe.cli.views import render_summary
        from hybrimoe.generation import Profile, interruptible

        self.opened.reset_stats()
        self._record()
        profile = Profile(self.opened.generator.model) if self.profiled else None
        with interruptible() as interrupt:
            turn = self.conversation.send(message, self.options, should_stop=interrupt, profile=profile)
            if turn.n_dropped and not self.quiet:
                render.note(f"the context is full: the oldest {turn.n_dropped} messages are no longer part of it")
            if self.as_json:
                "".join(turn)
            else:
                stream_out(turn)
                stream_out(["\n"])
        self._keep()
        self.last = render_summary.reply_as_dict(turn.reply, self.opened.stats())
        if self.as_json:
            self._emit({"model": self.opened.name, **self.last, "dropped_messages": turn.n_dropped})
            return
        if profile is not None:
            from hybrimoe.cli.views.render_profile import profile_table

            label = render_summary.provenance(self.last["experts"])
            render.err().print(profile_table(profile.as_dict(), label))
        if not self.quiet:
            render.note(f"[{render_summary.one_line(self.last)}]")

    def _keep(self) -> None:
        """The text of a session, after each change of it."""
        if self.session is not None:
            self.session.save_text(self.conversation)

    def _record(self) -> None:
        """A new recording for each reply, so that /timeline has the last one. A record costs about a microsecond, but
        a compiled step cannot be recorded, and would not run."""
        if self.opened.session is not None and self.opened.session.n_slots and self.at_terminal:
            self.opened.session.record_timeline(True)

    def _emit(self, data: dict[str, Any]) -> None:
        import json

        sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def _help(self) -> bool:
        for name, (line, _) in self.commands.items():
            render.note(f"{name:<10} {line}")
        render.note("anything else is a message; a backslash at its end, or Alt-Enter, continues it on the next line")
        return True

    def _reset(self) -> bool:
        self.conversation.reset()
        self._keep()
        render.note("the conversation is forgotten")
        return True

    def _stats(self) -> bool:
        from hybrimoe.cli.views import render_summary

        if self.last is None:
            render.note("no reply yet")
        else:
            render.err().print(render_summary.summary(self.last), style="dim")
        return True

    def _timeline(self) -> bool:
        from hybrimoe.cli.views import render_summary
        from hybrimoe.cli.views.render_timeline import timeline

        records = list(self.opened.session.timeline) if self.opened.session is not None else []
        if self.last is None or not records:
            render.note(
                "nothing was recorded yet (a conversation in a terminal records each reply where experts have slots;"
                " --profile shows where the time goes without)"
            )
            return True
        console = render.err()
        label = render_summary.provenance(self.last["experts"])
        console.print(timeline(records, label=label, width=console.width))
        return True

    def _unknown(self, word: str) -> bool:
        from hybrimoe.errors import did_you_mean

        render.note(f"{word} is no command{did_you_mean(word, list(self.commands))}; /help lists them")
        return True
