"""Whether a model still has the modules and weights that it was read with, where its compiled step reads them."""

from __future__ import annotations

from collections.abc import Iterator, ValuesView
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

END = object()


class AsRead:
    """Modules, parameters and buffers of a model, where their values lay, and how often they had been written to.

    All of it is asked in every step, behind a compiled call that has driven it out of the caches: what counts is how
    many objects are touched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables: list[ValuesView[Any]] = [
            table.values()
            for module in model.modules()
            for table in (module._modules, module._parameters, module._buffers)
            if table
        ]
        self._parts = list(self._present())
        weights = [part for part in self._parts if isinstance(part, torch.Tensor) and not part.is_meta]
        self._weights = weights
        self._counted = [weight for weight in weights if not weight.is_inference()]  # the others have no counter
        self._places, self._versions = self._state()

    def unchanged(self) -> bool:
        """False where a module, a weight or its storage was replaced, or a weight was written to."""
        return all(map(is_, self._present(), self._parts)) and self._state() == (self._places, self._versions)

    def _present(self) -> Iterator[Any]:
        """All that the modules' tables hold now, then END, which stands elsewhere where there is more or less."""
        return chain(chain.from_iterable(self._tables), (END,))

    def _state(self) -> tuple[list[int], list[int]]:
        return [weight.data_ptr() for weight in self._weights], [weight._version for weight in self._counted]
