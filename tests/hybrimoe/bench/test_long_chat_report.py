"""The tables of docs/long-chats.md, from small results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_chat_report", ROOT / "benchmarks" / "long_chat_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(contender: str, turn: str, ms: list[float], first: float) -> dict[str, Any]:
    middle = sorted(ms)[len(ms) // 2]
    return {
        "contender": contender, "context": 4096, "turn": turn, "tbt_ms": 7.0, "reused": 0, "from_disk": 0,
        "ttft_ms": {"median": middle, "min": min(ms), "max": max(ms), "rounds": ms}, "of_first": middle / first,
        "tiers": {"keys and values": 3 << 20},
    }  # fmt: skip


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": "olmoe-1b-7b", "weights": "random", "layers": 1, "expert_dtype": "int4", "turn_tokens": 24,
        "new_tokens": 8, "rounds": 3, "machine": {"cpu": "A CPU", "cores": 2}, "rows": rows,
    }  # fmt: skip


OURS = [row("hybrimoe", "first", [1000], 1000), row("hybrimoe", "second, own cache", [20, 10, 30], 1000)]
THEIRS = [row("llama.cpp", "first", [2000], 2000), row("llama.cpp", "second, own cache", [50], 2000)]


def test_turns_are_set_beside_each_other(report: ModuleType) -> None:
    text = report.table(result(OURS + THEIRS))
    assert "olmoe-1b-7b, 1 layer (random weights), int4 experts,\non A CPU, 2 cores" in text
    assert "| 4096 | hybrimoe | second, own cache | 20 (10 to 30) | 2.00% | 7.0 | 0 | 0 |" in text
    assert (
        "- 4096 tokens, llama.cpp's time to the first token over hybrimoe's: first: 2.00, second, own cache: 2.50"
        in text
    )
    assert "- 4096 tokens, hybrimoe: keys and values 3 MiB" in text


def test_without_llama_cpp_there_is_nothing_beside(report: ModuleType) -> None:
    assert "over hybrimoe's" not in report.table(result(OURS))


def test_what_stands_before_the_tables_stays(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, measured = tmp_path / "doc.md", tmp_path / "result.json"
    document.write_text(f"Words.\n{report.MARK}old", encoding="utf-8")
    measured.write_text(json.dumps(result(OURS)), encoding="utf-8")
    arguments = ["report", str(measured), "--document", str(document), "--cpu", "Another CPU"]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"Words.\n{report.MARK}")
    assert "old" not in text
    assert "on Another CPU, 2 cores" in text
