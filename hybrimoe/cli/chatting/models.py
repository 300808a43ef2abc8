"""The models that a chat may go on with: one is in memory, and makes room only for one that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import BudgetError, ConfigError, HybriMoEError, unknown

if TYPE_CHECKING:
    from hybrimoe.cli.shared.opening import OpenModel
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation import Conversation
    from hybrimoe.generation.saved.sessions import Session

__all__ = ["ChatModels", "Opened", "needed_bytes"]

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Opened:
    """A model in memory, a conversation with it, and what that is kept as (None: nothing)."""

    model: OpenModel
    conversation: Conversation
    session: Session | None


class ChatModels:
    """shelf: deployments by name. open_one: brings one into memory for as long as its block lasts.

    Used as a block, at whose end the model in memory leaves.
    """

    def __init__(
        self, shelf: Mapping[str, DeployConfig], open_one: Callable[[DeployConfig], AbstractContextManager[Opened]]
    ) -> None:
        self._shelf, self._open_one = dict(shelf), open_one
        self._stack = ExitStack()
        self.current = ""
        """Name of the model in memory."""

    def __enter__(self) -> ChatModels:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def sources(self) -> dict[str, str]:
        """Of each name the directory, file or id of its model."""
        return {name: one.model or name for name, one in self._shelf.items()}

    def open(self, name: str) -> Opened:
        """Bring a model into memory; none is there. Raises what opening it raises."""
        opened = self._stack.enter_context(self._open_one(self._shelf[name]))
        self.current = name
        return opened

    def check(self, name: str, messages: list[dict[str, Any]]) -> None:
        """Raises where another model cannot take the place of the one in memory, which stays.

        ConfigError: no model has this name, or it is in memory. BudgetError: it does not fit the memory that the other
        leaves. ModelError: its chat template takes no such conversation.
        """
        if name not in self._shelf:
            raise ConfigError(unknown("model", name, self._shelf))
        if name == self.current:
            raise ConfigError(f"{name} is the model that this conversation is with; /models lists the others")
        self._check_memory(name)
        self._check_template(name, messages)

    def change(self, name: str, messages: list[dict[str, Any]]) -> Opened:
        """Another model in the place of the one in memory. Raises as `check`, and what opening it raises: then the
        former one is in memory again, as a `FormerModel` in that error's place where it can be."""
        self.check(name, messages)
        former = self.current
        self._stack.close()
        try:
            return self.open(name)
        except HybriMoEError as error:
            raise FormerModel(self.open(former), f"{name} cannot be loaded: {error}; {former} is back") from error

    def _check_memory(self, name: str) -> None:
        from hybrimoe.machine.memory import available_bytes

        needed, held = (needed_bytes(self._shelf[one]) for one in (name, self.current))
        if needed is None:
            return
        free = available_bytes() + (held or 0)
        if needed > free:
            raise BudgetError(
                f"{name} needs about {needed / GIB:.1f} GiB of host memory, and {free / GIB:.1f} GiB are free once"
                f" {self.current} has left; {self.current} stays. Smaller: cpu.expert_dtype int4, or memory.disk: auto"
            )

    def _check_template(self, name: str, messages: list[dict[str, Any]]) -> None:
        from hybrimoe.checkpoint import load_tokenizer
        from hybrimoe.generation.chat import render_chat

        tokenizer = load_tokenizer(self._shelf[name].model)
        render_chat(tokenizer, [*messages, {"role": "user", "content": "Go on."}])


class FormerModel(HybriMoEError):
    """Another model could not be loaded, and the former one was opened anew."""

    def __init__(self, opened: Opened, message: str) -> None:
        super().__init__(message)
        self.opened = opened


def needed_bytes(deployment: DeployConfig) -> int | None:
    """Host memory that a model's weights take by its configuration, at most; None where that does not tell its sizes.

    Experts that may stay on disk do not count.
    """
    from hybrimoe.checkpoint.meta import model_shape
    from hybrimoe.tracing.study.planning import dense_bytes
    from scheduler.errors import ProfileError
    from yaml_rules.errors import YamlRulesError

    try:
        shape = model_shape(deployment.model, deployment.vision, deployment.rope)
    except (ProfileError, YamlRulesError):
        return None
    cpu = deployment.cpu
    expert_dtype, dense_dtype = ("bfloat16" if one == "auto" else one for one in (cpu.expert_dtype, cpu.dense_dtype))
    dense = dense_bytes(shape, dense_dtype)
    if deployment.memory.disk.kind != "none":
        return dense
    return dense + shape.n_layers * shape.n_experts * int(shape.expert_bytes(expert_dtype))
