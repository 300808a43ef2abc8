"""Methods of an injected model that stand before those of its class, where these would lose or overlook something."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import nn

from hybrimoe.errors import ModelError
from hybrimoe.experts.absent import AbsentWeights, explanation

MARK = "hybrimoe"
"""Attribute of an injected model that holds its Injection."""

SAVE = "save_pretrained"
EMBEDDINGS = ("resize_token_embeddings", "set_input_embeddings", "set_output_embeddings")


def install_guards(model: nn.Module) -> None:
    """Puts the guards before the methods that the model's class has."""
    model.__dict__[SAVE] = SaveGuard(model)
    for name in EMBEDDINGS:
        if hasattr(type(model), name):
            model.__dict__[name] = EmbeddingsGuard(model, name)


def remove_guards(model: nn.Module) -> None:
    """The model's own methods again."""
    for name in (SAVE, *EMBEDDINGS):
        model.__dict__.pop(name, None)


class Guard:
    """A method of one injected model; it does not keep the model alive."""

    def __init__(self, model: nn.Module) -> None:
        self._reference = weakref.ref(model)

    @property
    def model(self) -> Any:
        """The injected model."""
        return self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        """The guard of a copied model is for that one."""
        twin = copy.copy(self)
        twin._reference = weakref.ref(memo.get(id(self.model), self.model))
        return twin


class SaveGuard(Guard):
    """Stands for `save_pretrained`: saves what is whole, refuses what exists only packed."""

    def __call__(self, *args: Any, state_dict: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> Any:
        """Saves as the model's class does. Raises ModelError before anything is written."""
        model = self.model
        if state_dict is None:
            state_dict = model.state_dict()
            absent = [value for value in state_dict.values() if isinstance(value, AbsentWeights)]
            if absent:
                raise ModelError(explanation(absent[0].origin))
        return type(model).save_pretrained(model, *args, state_dict=state_dict, **kwargs)


class EmbeddingsGuard(Guard):
    """Stands for a method that replaces the embeddings of tokens or the output layer."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model)
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's class has it; the compiled decode step, which reads weights where they lie, is made anew.

        Raises ModelError, with the model as it was, where dense layers are packed: a new output layer would lie beside
        the packed one.
        """
        model = self.model
        injection = getattr(model, MARK)
        if injection.dense is not None and injection.dense.paths:
            raise ModelError(
                f"{self._name}: the dense layers of this model are packed as {injection.config.cpu.dense_dtype}"
                f" (cpu.dense_dtype), so its embeddings cannot be changed: call model.{MARK}.restore() first and inject"
                f" again afterwards, or load it with another dense_dtype"
            )
        with injection.without_step():
            return getattr(type(model), self._name)(model, *args, **kwargs)
