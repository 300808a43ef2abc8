"""Marks the families that stand for the others in `make test`; the rest is for `make test-all`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if str(Path(__file__).parent) not in sys.path:  # where tiny_families is; other folders' tests use it, too
    sys.path.insert(0, str(Path(__file__).parent))

REPRESENTATIVE = ("deepseek_v3", "gpt_oss", "jamba", "llama4", "mixtral", "qwen3_next")
"""Latent attention, biases and interleaved projections, Mamba, sorted tokens, the plain form, linear attention."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        if item.get_closest_marker("families") and callspec and callspec.params.get("family") in REPRESENTATIVE:
            item.add_marker(pytest.mark.representative)
