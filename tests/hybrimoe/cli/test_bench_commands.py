"""Benchmarks from the command line, as short as they can be: what is measured arrives in the table and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def missing(out: str, *words: str) -> list[str]:
    """Words that a table should have."""
    return [word for word in words if word not in out]


def test_overhead_is_told_for_each_contender(hybrimoe: Any, small_shape: Callable[..., str]) -> None:
    line = "overhead --layers 2 --steps 2 --rounds 1 --policy ours --dtype float32 --slots 0.5"
    shown = hybrimoe("bench", *line.split(), "--shape", small_shape())
    assert shown.code == 0, shown.err
    assert not missing(shown.out, "CPU only", "bookkeeping", "planning", "overhead", "its share")


def test_tiers_are_set_beside_each_other(hybrimoe: Any, small_shape: Callable[..., str], tmp_path: Path) -> None:
    line = "tiers --layers 2 --dtype float32 --share 0.5 --share 0.75 --prompt-tokens 4 -n 2 --rounds 1 --threads 1"
    shown = hybrimoe("bench", *line.split(), "--shape", small_shape(), "--folder", tmp_path)
    assert shown.code == 0, shown.err
    assert not missing(shown.out, "50%", "75%", "ours", "static", "mmap", "prefill", "decode")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_streaming_has_a_row_for_each_number_of_clients(hybrimoe: Any) -> None:
    line = "streaming --clients 2 --new-tokens 4 --rounds 1 --accelerator none --threads 1"
    result = hybrimoe("bench", *line.split(), "--clients", 1, "--json")
    assert result.code == 0, result.err
    assert [(row["clients"], row["tokens"]) for row in result.data["rows"]] == [(2, 8), (1, 4)]
    assert result.data["machine"]["cores"] >= 1
    shown = hybrimoe("bench", *line.split())
    assert shown.code == 0, shown.err
    assert not missing(shown.out, "clients", "served", "engine", "added", "first byte", "between two", "4 a reply")


def test_keys_and_values_are_shown_as_a_table(hybrimoe: Any) -> None:
    line = "kv --shape olmoe-1b-7b --layers 1 --quick --rounds 1 --dtype int4 --context 40 --kv-dtype int8"
    shown = hybrimoe("bench", *line.split())
    assert shown.code == 0, shown.err
    assert not missing(shown.out, "bfloat16", "int8", "bytes a token")
    refused = hybrimoe("bench", "kv", "--kv-dtype", "int5")
    assert refused.code == 2
    assert "int4" in refused.err


@pytest.mark.slow
def test_a_soak_tells_what_was_sent(hybrimoe: Any) -> None:
    line = "soak --requests 6 --users 2 --minutes 1 --new-tokens 2 --long-words 8 --accelerator none --threads 1"
    shown = hybrimoe("bench", *line.split())
    assert shown.code == 0, shown.err
    assert not missing(shown.out, "6 in", "resident memory", "problems")
