"""A chat as it stands, and its replies: shown as they come, with what they cost."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.cli.chatting.models import ChatModels, Opened
    from hybrimoe.cli.shared.opening import OpenModel
    from hybrimoe.generation import Conversation, Profile, SamplingOptions
    from hybrimoe.generation.images.reading import ImageFile
    from hybrimoe.generation.saved.sessions import Session


class Chat:
    """A conversation with an open model, and how its replies are sampled, shown and kept.

    last: the last reply as data, None before the first. leaves: whether the chat is to end.
    """

    def __init__(
        self, opened: OpenModel, conversation: Conversation, options: SamplingOptions, *, session: Session | None,
        profiled: bool, quiet: bool, as_json: bool, markdown: bool = True, models: ChatModels | None = None,
    ) -> None:  # fmt: skip
        """markdown: replies are drawn as Markdown where stdout is a terminal. models: that the chat may go on with."""
        self.opened = opened
        self.conversation = conversation
        self.options = options
        self.session = session
        self.models = models
        self.profiled = profiled
        self.quiet = quiet
        self.as_json = as_json
        self._markdown = markdown
        self.at_terminal = sys.stdin.isatty() and not as_json
        self.images: list[ImageFile] = []
        """That the next message shows."""
        self.last: dict[str, Any] | None = None
        self.leaves = False

    def answer(self, message: str, *, options: SamplingOptions | None = None, instead: bool = False) -> str:
        """Show the reply to `message` as it comes, and what it cost; returns its text.

        options: in place of those of the chat. instead: the message takes the place of the last one and of its reply.
        """
        from hybrimoe.cli.views import render_summary
        from hybrimoe.generation import Profile, interruptible

        self.opened.reset_stats()
        self._record()
        profile = Profile(self.opened.generator.model) if self.profiled else None
        with interruptible() as interrupt:
            turn = self.conversation.send(
                message, options or self.options, images=self.images, instead=instead, should_stop=interrupt,
                profile=profile,
            )  # fmt: skip
            self.images = []
            if turn.n_dropped and not self.quiet:
                render.note(f"the context is full: the oldest {turn.n_dropped} messages are no longer part of it")
            self._show(turn)
        self.keep()
        self.last = render_summary.reply_as_dict(turn.reply, self.opened.stats())
        if self.as_json:
            self.emit({"model": self.opened.name, **self.last, "dropped_messages": turn.n_dropped})
        else:
            self._tell(self.last, profile)
        return turn.reply.text

    def change_model(self, name: str) -> None:
        """Go on with another model: what was said stays. Raises as `ChatModels.change`; without models, ConfigError."""
        from hybrimoe.cli.chatting.models import FormerModel
        from hybrimoe.errors import ConfigError

        if self.models is None:
            raise ConfigError("this chat has one model; --models FOLDER, or server.models in its --config, gives more")
        messages, system = self.conversation.messages, self.conversation.system
        self.models.check(name, messages)
        if self.session is not None:
            self.session.drop_states()
        try:
            self._go_on_with(self.models.change(name, messages), system, messages)
        except FormerModel as error:
            self._go_on_with(error.opened, system, messages)
            raise

    def _go_on_with(self, opened: Opened, system: str | None, messages: list[dict[str, Any]]) -> None:
        self.opened, self.conversation, self.session = opened.model, opened.conversation, opened.session
        self.conversation.take_up(system, messages)
        self.keep()

    def _show(self, turn: Iterable[str]) -> None:
        """A reply as it comes; with JSON it is told when it is complete."""
        from hybrimoe.cli.chatting.markdown import can_redraw, show_markdown
        from hybrimoe.cli.shared.opening import stream_out

        console = render.out()
        if self.as_json:
            "".join(turn)
        elif self._markdown and can_redraw(console):
            show_markdown(turn, console)
        else:
            stream_out(turn)
            stream_out(["\n"])

    def _tell(self, reply: dict[str, Any], profile: Profile | None) -> None:
        """What a reply cost, on stderr: a line that says in a terminal how full the context is."""
        from hybrimoe.cli.views import render_summary

        if profile is not None:
            from hybrimoe.cli.views.render_profile import profile_table

            label = render_summary.provenance(reply["experts"])
            render.err().print(profile_table(profile.as_dict(), label))
        if self.quiet:
            return
        if self.at_terminal:
            line = render_summary.status(reply, self.opened.generator.context_tokens)
        else:
            line = render_summary.one_line(reply)
        render.note(f"[{line}]")

    def keep(self) -> None:
        """The text of a session, after each change of it."""
        if self.session is not None:
            self.session.save_text(self.conversation)

    def _record(self) -> None:
        """A new recording for each reply, so that /timeline has the last one. A record costs about a microsecond, but
        a compiled step cannot be recorded, and would not run."""
        if self.opened.session is not None and self.opened.session.n_slots and self.at_terminal:
            self.opened.session.record_timeline(True)

    def emit(self, data: dict[str, Any]) -> None:
        """A line of JSON on stdout."""
        import json

        sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
        sys.stdout.flush()
