"""Bytecode of own modules in the cache: taken where it is that of the source, made anew in every other case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.machine import bytecode
from hybrimoe.machine.bytecode import KeptLoader, OwnModules


@pytest.fixture
def module(tmp_path: Path) -> tuple[Path, Path]:
    """A source, and where its bytecode is kept."""
    source = tmp_path / "own.py"
    source.write_text("VALUE = 1\n")
    return source, tmp_path / "kept" / "own.pyc"


def value(module: tuple[Path, Path]) -> Any:
    source, kept = module
    names: dict[str, Any] = {}
    code = KeptLoader("own", str(source), kept).get_code("own")
    assert code is not None
    assert code.co_filename == str(source)
    exec(code, names)
    return names["VALUE"]


def test_what_is_kept_is_taken_without_the_source_being_compiled(
    module: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert value(module) == 1
    assert [path.name for path in module[1].parent.iterdir()] == ["own.pyc"]
    monkeypatch.setattr(KeptLoader, "source_to_code", None)
    assert value(module) == 1
    assert not (module[0].parent / "__pycache__").exists()


def test_another_source_is_compiled(module: tuple[Path, Path]) -> None:
    source, _ = module
    assert value(module) == 1
    source.write_text("VALUE = 2\n")  # of the same size
    os.utime(source, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns + 1_000_000_000))
    assert value(module) == 2
    source.write_text("VALUE = 33\n")
    assert value(module) == 33
    assert value(module) == 33


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other Python", "folder"])
def test_a_damaged_file_is_compiled_anew(module: tuple[Path, Path], damage: str) -> None:
    _, kept = module
    assert value(module) == 1
    content = kept.read_bytes()
    if damage == "folder":
        kept.unlink()
        kept.mkdir()
    else:
        damaged = {"cut": content[:-5], "empty": b"", "flipped": content[:-1] + bytes([content[-1] ^ 1])}
        kept.write_bytes(damaged.get(damage, b"x" + content[1:]))
    assert value(module) == 1
    if damage != "folder":
        assert kept.read_bytes() == content


def test_a_cache_that_cannot_be_written_to_is_no_error(module: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("not a directory")
    assert value(module) == 1
    assert value(module) == 1


def test_other_packages_and_modules_with_bytecode_are_left_to_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = OwnModules(tmp_path)
    assert finder.find_spec("json", None) is None
    monkeypatch.setattr(bytecode, "cache_from_source", lambda origin: str(tmp_path / "absent.pyc"))
    found = finder.find_spec("hybrimoe", None)
    assert found is not None
    assert isinstance(found.loader, KeptLoader)
    assert found.submodule_search_locations
    (tmp_path / "absent.pyc").touch()
    assert finder.find_spec("hybrimoe", None) is None


def test_a_command_keeps_its_bytecode_and_takes_it_again(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for package in bytecode.PACKAGES:
        target = tree / package
        source = bytecode.ROOT / package
        names = [path.relative_to(source) for path in source.rglob("*.py")]
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((source / name).read_bytes())
    own = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "HYBRIMOE_CACHE": str(tmp_path / "cache")}
    environment = {**os.environ, **own}
    command = [sys.executable, "-m", "hybrimoe", "inspect", "--help"]
    for _ in range(2):
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
        (of_these,) = (tmp_path / "cache" / "bytecode").iterdir()
        assert (of_these / "hybrimoe.cli.inspect.pyc").is_file()
    assert not list(tree.rglob("__pycache__"))
