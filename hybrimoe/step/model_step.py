"""What stands before a model's forward and answers the decode steps that it can: the base of all its kinds."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

HARMLESS = ("transformers.utils.output_capturing", "hybrimoe.generation.module_parts")
"""Modules whose hooks do nothing in a step: transformers leaves its own in a model once it was asked for hidden states
or router logits; those of a profile time modules that are called."""


class ModelStep:
    """Steps of one model. What cannot be served is left to transformers, call by call.

    The KV cache is the caller's own, in the layers of `hybrimoe.generation.growing`, so the ways can alternate.
    called: modules that a step calls as they are, so that hooks in them are no hindrance.
    """

    def __init__(self, model: nn.Module, session: Any, called: Sequence[nn.Module] = ()) -> None:
        self.model = model
        self.session = session
        self.lock = threading.RLock()
        seen = {id(module) for module in (model, *called)}
        self._hooks = [
            hooks for module in model.modules() if id(module) not in seen
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]  # fmt: skip
        self.embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        self._as_read = AsRead(model)
        self._in_a_plane: list[Any] = [module for module in model.modules() if hasattr(module, "rope_deltas")]
        self.n_steps = 0
        self.step_us = 0.0

    def answer(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the model's forward, which is `own`, for a call."""
        raise NotImplementedError

    def next_logits(
        self, token_ids: Sequence[int], cache: Any, *, drafted: bool = False, shift: int = 0
    ) -> torch.Tensor | None:
        """Logits [1, V] after new tokens of one sequence; None where the model's forward must be called.

        The short way of `answer` for callers that hold plain numbers and a cache. drafted: the tokens after the first
        are guesses about the next decode steps, and the logits are those after each of the n tokens, [n, V]. shift: by
        how much images before the tokens move their positions.
        """
        return None

    def logits_of_each(
        self, token_ids: Sequence[int], caches: Sequence[Any], shifts: Sequence[int] = ()
    ) -> torch.Tensor | None:
        """Logits [n, V] after a new token of each of n sequences, which have a cache of one sequence each, and whose
        images move its position by so many `shifts` (none given: by none).

        Each row has the bits that `next_logits` gives for the sequence alone. None, and nothing computed, where the
        sequences must be computed one after another. A failure leaves the caches with the tokens that they had.
        """
        return None

    @property
    def differs_in_batches(self) -> str | None:
        """Why several tokens in one step may not get the bits that they get one by one; None where they do."""
        raise NotImplementedError

    @property
    def one_by_one(self) -> str | None:
        """Why sequences of different lengths are not computed in one step; None where `logits_of_each` does it."""
        return self.differs_in_batches

    def keep_for(self, n_sequences: int) -> None:
        """So many sequences will take turns: what the step keeps of each must last from turn to turn."""

    def undo(self) -> None:
        """Takes away what the step has put into the model; whoever put it before the forward takes it from there."""

    def usable(self) -> bool:
        """Whether the model is as it was when it was read, and nobody watches what the step would leave out."""
        return (
            not self.model.training
            and self._as_read.unchanged()
            and not self.is_watched(self._hooks)
            and not torch_module._global_forward_hooks
            and not torch_module._global_forward_pre_hooks
        )

    def is_moved(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call leaves it to the model where its tokens stand, and the model remembers images before them."""
        if kwargs.get("position_ids") is not None:
            return False
        deltas = [module.rope_deltas for module in self._in_a_plane]
        return any(delta is not None and bool(torch.as_tensor(delta).any()) for delta in deltas)

    @staticmethod
    def is_watched(hooks_of_modules: Sequence[Mapping[int, Any]]) -> bool:
        """Whether somebody's hooks are among these, waiting for calls that the step would leave out."""
        return any(hooks_of_modules) and any(
            hook.__module__ not in HARMLESS for hooks in hooks_of_modules for hook in hooks.values()
        )

    def report(self, stats: Any) -> None:
        """Adds to a session's counters what was computed since the last report; nothing where its own layers count."""

    def meter(self) -> tuple[dict[str, int], float]:
        """Clock ticks of the step's work so far by part, in the thread that called, and its us; without that in modules
        that a profile times by themselves (`generation.module_parts`).

        Two readings say what was between them. (Shares of all ticks do not: the first step has little but its start in
        its us.)
        """
        raise NotImplementedError


class AsRead:
    """Whether a model still has the modules and weights that it was read with, where its compiled step reads them.

    Modules, parameters and buffers, where their values lay, and how often they had been written to.

    All of it is asked in every step, behind a compiled call that has driven it out of the caches: what counts is how
    many objects are touched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables: list[dict[str, Any]] = [
            table
            for module in model.modules()
            for table in (module._modules, module._parameters, module._buffers)
            if table
        ]
        self._parts = self._present()
        weights = [part for part in self._parts if isinstance(part, torch.Tensor) and not part.is_meta]
        self._weights = weights
        self._counted = [weight for weight in weights if not weight.is_inference()]  # the others have no counter
        self._places, self._versions = self._state()

    def unchanged(self) -> bool:
        """False where a module, a weight or its storage was replaced, or a weight was written to."""
        present, known = self._present(), self._parts
        as_before = len(present) == len(known) and all(map(is_, present, known))
        return as_before and self._state() == (self._places, self._versions)

    def _present(self) -> list[Any]:
        """All that the modules' tables hold now, in order. The garbage collector tells it in three fifths of the time
        that views of hundreds of tables take; torch.compile, which would trace this, does not know that call."""
        if torch.compiler.is_compiling():
            return [part for table in self._tables for part in table.values()]
        return gc.get_referents(*self._tables)

    def _state(self) -> tuple[list[int], list[int]]:
        return [weight.data_ptr() for weight in self._weights], [weight._version for weight in self._counted]
