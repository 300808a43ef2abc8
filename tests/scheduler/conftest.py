"""Shared inputs of the trace tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def real_traces() -> Path:
    """Folder of the published traces; the test is skipped, visibly, where it is absent."""
    shared = Path(os.environ.get("HYBRIMOE_SHARED", ROOT.parent / "shared"))
    if not (shared / "traces" / "gpt-oss-20b.decode.npz").is_file():
        pytest.skip(f"published routing traces are not at {shared}/traces (set HYBRIMOE_SHARED)")
    return shared / "traces"
