"""How much host memory the prefix cache may take."""

from __future__ import annotations

from typing import Any

import psutil

from hybrimoe.amounts import Amount
from hybrimoe.errors import BudgetError
from hybrimoe.generation.kv_memory import estimated_token_bytes
from hybrimoe.generation.prefix.blocks import BLOCK_TOKENS
from hybrimoe.machine.memory import available_bytes

__all__ = ["prefix_budget_bytes"]

AUTO_SHARE = 0.5
"""Of the host memory that is free beside the model and the keys and values of replies. On a host without an accelerator
that is a quarter of what is free once the model is loaded; a prompt's intermediate results take an eighth."""


def prefix_budget_bytes(model: Any, setting: Amount, kv_bytes: int) -> int:
    """Bytes of host memory that the prefix cache may take beside keys and values of the replies under way.

    setting: `server.prefix_cache`: a size, a share of the host's memory, none, or auto, which is half of what is free
    once the model is loaded and `kv_bytes` are set aside, where these lie in host memory, too.

    Raises:
        BudgetError: a setting of less than one block of tokens.
    """
    if setting.kind == "none":
        return 0
    beside = kv_bytes if model.device.type == "cpu" else 0
    free = max(0, available_bytes() - beside)
    budget = setting.to_bytes(psutil.virtual_memory().total, int(AUTO_SHARE * free))
    needed = BLOCK_TOKENS * estimated_token_bytes(model)
    if budget >= needed:
        return budget
    if setting.kind == "auto":
        return 0
    raise BudgetError(
        f"server.prefix_cache: {setting} is {budget} bytes, and {BLOCK_TOKENS} tokens take {needed}; give more, for"
        " example 1GiB, or none"
    )
