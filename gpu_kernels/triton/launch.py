"""What every launch is compiled with, and what the installed Triton can do."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

COMPILED_WITH: dict[str, Any] = {"enable_fp_fusion": True}
"""A product and a sum are rounded once. Said at each launch, because Triton 3.10 no longer does it by itself."""
CAN_OVERLAP = tuple(int(part) for part in version("triton").split(".")[:2]) >= (3, 5)
"""Whether a kernel can wait for the one before it: the functions for that do not compile in Triton 3.4."""
