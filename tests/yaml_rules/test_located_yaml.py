"""Safe YAML: plain data comes out with its lines, everything else is an error with file and line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from yaml_rules.errors import YamlRulesError
from yaml_rules.located import Located, parse_yaml, plain_value, read_yaml


def test_every_value_knows_its_line() -> None:
    located = parse_yaml("a: 1\nb:\n  - c: x\n\n    d: [1,\n      2]\n", "f.yaml")
    assert located.data == {"a": 1, "b": [{"c": "x", "d": [1, 2]}]}
    assert [located.line(path) for path in [("a",), ("b",), ("b", 0), ("b", 0, "d"), ("b", 0, "d", 1)]] == [
        1,
        2,
        3,
        5,
        6,
    ]
    assert located.where(("b", 0, "nowhere", 3)) == "f.yaml:3"
    assert located.sub(("b", 0)).where(("d",)) == "f.yaml:5"
    assert Located({"a": 1}).where(("a",)) == "<mapping>"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: !!python/object/apply:os.system [ls]", 1, "tag"),
        ("x: 1\na: !!python/name:os.system x", 2, "tag"),
        ("a: !custom 3", 1, "tag '!custom' is not allowed"),
        ("a: 1\nb: 2\na: 3", 3, "'a' appears twice"),
        ("a: &x [*x]", 1, "contains itself"),
        ("? [1]\n: 2", 1, "plain key"),
        ("1.5: a", 1, "expected text as key, found 1.5"),
        ("a: &x {b: 1}\nc:\n  <<: *x", 3, "merge keys"),
        ("a: [1", 1, "not valid YAML"),
        ("a: " + "9" * 5000, 1, "cannot be read"),
        ("a: 1\n--- \nb: 2", 2, "another document"),
    ],
)
def test_what_is_no_plain_data_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(YamlRulesError, match=message) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value).startswith(f"f.yaml:{line}: ")


def test_an_alias_bomb_and_deep_nesting_end_in_an_error() -> None:
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    with pytest.raises(YamlRulesError, match="more than 50000 values"):
        parse_yaml(bomb)
    with pytest.raises(YamlRulesError, match="nested too deeply"):
        parse_yaml("[" * 1_200)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(YamlRulesError, match="no such file"):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(YamlRulesError, match="found a directory"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(YamlRulesError, match="expected UTF-8 text"):
        read_yaml(tmp_path / "binary.yaml")
    (tmp_path / "control.yaml").write_bytes(b"a: \x00")
    with pytest.raises(YamlRulesError, match="not valid YAML"):
        read_yaml(tmp_path / "control.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("off", "off"), ("yes", "yes"), ("y", "y"), ("2026-01-01", "2026-01-01"), ("1:30", "1:30"),
        ("010", 10), ("0o17", 15), ("0x1F", 31), ("-7", -7), ("1e-3", 1e-3), ("1.", 1.0), (".5", 0.5),
        ("-.inf", -math.inf), ("true", True), ("False", False), ("~", None), ("", None), ("null", None),
        ("1_000", "1_000"), ("=", "="), ("-", [None]), ("6GiB", "6GiB"), ("9" * 25, int("9" * 25)),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = plain_value(text)
    assert found == value
    assert type(found) is type(value)


def test_a_long_value_is_not_repeated_whole_in_an_error() -> None:
    with pytest.raises(YamlRulesError, match=r"^a value:1: '9{60}'\.\.\. cannot be read: Exceeds the limit") as raised:
        plain_value("9" * 5000)
    assert len(str(raised.value)) < 300
