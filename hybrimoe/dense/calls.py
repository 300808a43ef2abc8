"""Something that holds during the calls of a model, by how many tokens a call has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from threading import get_ident
from typing import Any

import torch
from torch import nn

MAX_TOKENS = 16
"""A call of more is a prompt."""


class AroundCalls:
    """Enters a context in each call of a model and leaves it at the call's end, failed or not.

    context_for: from a call's number of tokens (0 where its inputs do not tell) to what is entered. Threads that call
    the model at once do not see each other's. Calls that torch has compiled run without: a graph cannot enter anything.
    """

    def __init__(self, model: nn.Module, context_for: Callable[[int], AbstractContextManager[Any]]) -> None:
        self._context_for = context_for
        self._entered: dict[int, list[ExitStack]] = {}
        """By thread: what was entered in each of the calls that it is in."""
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def undo(self) -> None:
        """Takes the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        entered = ExitStack()
        entered.enter_context(self._context_for(n_tokens_of(args, kwargs)))
        self._entered.setdefault(get_ident(), []).append(entered)

    def _leave(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        calls = self._entered[get_ident()]
        calls.pop().close()
        if not calls:
            del self._entered[get_ident()]


def n_tokens_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Tokens of a call of a language model; 0 where its inputs do not tell."""
    ids, embeddings = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    return embeddings.shape[:-1].numel() if isinstance(embeddings, torch.Tensor) else 0
