"""Whether a model still has the modules and weights that it was read with, where its compiled step reads them."""

from __future__ import annotations

from itertools import chain
from operator import is_

import torch
from torch import nn


class AsRead:
    """Modules, parameters and buffers of a model, and where their values lay."""

    def __init__(self, model: nn.Module) -> None:
        tables = ((module._modules, module._parameters, module._buffers) for module in model.modules())
        self._tables = [table for table in chain.from_iterable(tables) if table]
        self._parts = list(chain.from_iterable(table.values() for table in self._tables))
        self._weights = [part for part in self._parts if isinstance(part, torch.Tensor) and not part.is_meta]
        self._addresses = [weight.data_ptr() for weight in self._weights]

    def unchanged(self) -> bool:
        """False where a module, a weight or its storage was replaced, added or taken away."""
        if sum(map(len, self._tables)) != len(self._parts):
            return False
        now = chain.from_iterable(table.values() for table in self._tables)
        return all(map(is_, now, self._parts)) and list(map(torch.Tensor.data_ptr, self._weights)) == self._addresses
