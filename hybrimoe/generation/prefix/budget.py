"""How much host memory and how much of a disk the prefix cache may take, and the cache that takes it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrimoe.amounts import Amount, size_text
from hybrimoe.errors import BudgetError, FileError
from hybrimoe.generation.kv_memory import estimated_token_bytes
from hybrimoe.generation.prefix.blocks import BLOCK_TOKENS, PrefixTree
from hybrimoe.generation.prefix.disk import DiskLevel
from hybrimoe.machine.memory import available_bytes, total_bytes

__all__ = ["DiskSettings", "PrefixSettings", "disk_budget_bytes", "prefix_budget_bytes", "prefix_tree"]

AUTO_SHARE = 0.5
"""Of the host memory that is free beside the model and the keys and values of replies. On a host without an accelerator
that is a quarter of what is free once the model is loaded; a prompt's intermediate results take an eighth."""
AUTO_DISK_SHARE = 0.25
"""Of what is free on the disk, what the files of the cache take there already included."""


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """The disk level. size: a size, a share of the disk, none, or auto; identity: of the model, as it runs."""

    folder: Path
    size: Amount
    identity: str


@dataclass(frozen=True, slots=True)
class PrefixSettings:
    """The prefix cache. memory: see `prefix_budget_bytes`; disk: None for no disk level."""

    memory: Amount = field(default_factory=lambda: Amount("auto"))
    disk: DiskSettings | None = None


def prefix_tree(model: Any, settings: PrefixSettings, kv_bytes: int) -> PrefixTree | None:
    """The prefix cache of a model; None where it has no memory.

    Raises:
        BudgetError: a size of less than one block of tokens, or a disk level without memory.
        FileError: a folder that cannot be written to.
    """
    budget = prefix_budget_bytes(model, settings.memory, kv_bytes)
    disk = settings.disk
    if disk is None or disk.size.kind == "none":
        return PrefixTree(model, budget) if budget else None
    if settings.memory.kind == "none":
        raise BudgetError(
            "server.prefix_cache_disk: what is kept on disk comes back through server.prefix_cache, which is none; give"
            " that a size, too"
        )
    if not budget:
        return None
    tree = PrefixTree(model, budget)
    if tree.reason is None:
        try:
            tree = PrefixTree(model, budget, DiskLevel(disk.folder, disk_budget_bytes(model, disk), disk.identity))
        except OSError as error:
            raise FileError(
                f"server.prefix_cache_folder: cannot use {disk.folder} ({error.strerror}); expected a folder that can"
                " be written to"
            ) from error
    return tree


def disk_budget_bytes(model: Any, disk: DiskSettings) -> int:
    """Bytes that the files of the disk level may take. Raises BudgetError, and OSError where the folder cannot be."""
    disk.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    usage = shutil.disk_usage(disk.folder)
    held = sum(file.stat().st_size for file in disk.folder.glob("*.kv"))
    budget = disk.size.to_bytes(usage.total, int(AUTO_DISK_SHARE * (usage.free + held)))
    needed = BLOCK_TOKENS * estimated_token_bytes(model)
    if budget < needed:
        raise BudgetError(
            f"server.prefix_cache_disk: {disk.size} is {size_text(budget)}, and {BLOCK_TOKENS} tokens take"
            f" {size_text(needed)}; give more, for example 20GiB, or none"
        )
    return budget


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
    budget = setting.to_bytes(total_bytes(), int(AUTO_SHARE * free))
    needed = BLOCK_TOKENS * estimated_token_bytes(model)
    if budget >= needed:
        return budget
    if setting.kind == "auto":
        return 0
    raise BudgetError(
        f"server.prefix_cache: {setting} is {budget} bytes, and {BLOCK_TOKENS} tokens take {needed}; give more, for"
        " example 1GiB, or none"
    )
