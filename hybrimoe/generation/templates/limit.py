"""A time limit for chat templates: programs that come with a model, run in jinja's sandbox by transformers.

The sandbox keeps them from files and attributes, not from endless loops, and a thread cannot be ended from outside. So
each line of a template looks at the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hybrimoe.errors import ModelError

__all__ = ["TEMPLATE_SECONDS", "time_limit"]

TEMPLATE_SECONDS = 10.0
"""The slowest published templates take some ms for a conversation of 100 messages."""
TEMPLATE_FILE = "<template>"
"""What jinja names the file of a template that is given as text."""


@contextmanager
def time_limit(seconds: float = TEMPLATE_SECONDS) -> Iterator[None]:
    """Templates that this thread renders within the block end by then. Raises ModelError where one does not."""
    end_s = time.monotonic() + seconds

    def at_line(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end_s:
            raise ModelError(
                f"the model's chat template did not end within {seconds:g} seconds; give the model folder another one"
            )
        return at_line

    def at_call(frame: FrameType, event: str, argument: Any) -> Any:
        return at_line if frame.f_code.co_filename == TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        yield
    finally:
        sys.settrace(before)
