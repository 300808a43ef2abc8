"""Whether the experts fit host memory, asked before they are read."""

from __future__ import annotations

import psutil

from hybrimoe.amounts import Amount
from hybrimoe.errors import BudgetError


def check_host_memory(host: Amount, needed_bytes: int, num_experts: int) -> None:
    """Raises BudgetError where `num_experts` of `needed_bytes` together are more than `host` allows ("auto": than what
    is available)."""
    memory = psutil.virtual_memory()
    match host.kind:
        case "bytes":
            allowed, what = int(host.value), "memory.host allows"
        case "share":
            allowed, what = int(host.value * memory.total), f"memory.host allows {host} of all memory,"
        case "count":
            allowed, what = int(host.value * needed_bytes / num_experts), f"memory.host allows {host} experts,"
        case _:
            allowed, what = memory.available, "this machine has free"
    if needed_bytes > allowed:
        raise BudgetError(
            f"the packed experts need {needed_bytes / 2**30:.2f} GiB of host memory, {what} {allowed / 2**30:.2f} GiB;"
            " choose a smaller expert_dtype (int8, int4), or let them stay on disk (memory.disk: auto)"
        )


def check_disk(disk: Amount, needed_bytes: int) -> None:
    """Raises BudgetError where a packed file of `needed_bytes` is more than a size given for `disk` allows."""
    if disk.kind == "bytes" and needed_bytes > disk.value:
        raise BudgetError(
            f"the packed experts need {needed_bytes / 2**30:.2f} GiB, memory.disk allows {disk.value / 2**30:.2f} GiB;"
            " choose a smaller expert_dtype (int8, int4)"
        )
