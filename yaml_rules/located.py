"""Safe YAML that remembers on which line each value stands, so that every later error can name file and line.

Only plain data comes out (mappings with text or integer keys, lists, text, numbers, booleans, null). Python tags,
duplicate keys, recursive aliases and alias bombs are errors. What is a number or a truth value says YAML 1.2: `no` and
`2026-01-01` are texts, 010 is ten, and 1e-3 is a number, where PyYAML has them as YAML 1.1 does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from yaml_rules.errors import YamlRulesError

KeyPath = tuple[str | int, ...]

_TAG_PREFIX = "tag:yaml.org,2002:"
_PLAIN_TAGS: dict[type[yaml.Node], frozenset[str]] = {
    yaml.ScalarNode: frozenset({"str", "int", "float", "bool", "null"}),
    yaml.SequenceNode: frozenset({"seq"}),
    yaml.MappingNode: frozenset({"map"}),
}

_SCALARS = (  # the core schema of YAML 1.2, section 10.3.2; and merge keys, which are refused by name
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
)
_BASES = {"0o": 8, "0x": 16}
_SHOWN_CHARACTERS = 60  # of a value, in an error

MAX_NODES = 50_000  # far above any rule file; stops alias bombs
MAX_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Located:
    """Plain data with its source (a file name or "<mapping>") and the line of each key path, counted from 1."""

    data: Any
    source: str = "<mapping>"
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def line(self, path: KeyPath = ()) -> int | None:
        """Line of `path`, or of its nearest ancestor; None where the data did not come from text."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None

    def sub(self, path: KeyPath) -> Located:
        """The part of the document under `path`, with its lines."""
        data = self.data
        for key in path:
            data = data[key]
        inner = {key[len(path) :]: line for key, line in self.lines.items() if key[: len(path)] == path}
        return Located(data, self.source, inner)

    def where(self, path: KeyPath = ()) -> str:
        """`file:line` of a key path (`file` alone where the line is unknown)."""
        line = self.line(path)
        return self.source if line is None else f"{self.source}:{line}"


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 # PyYAML's own form

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """The int of a node, which YAML 1.1 would read in other bases."""
        return int(node.value, _BASES.get(node.value[:2], 10))


for _kind, _pattern, _first in _SCALARS:
    _firsts = ["" if character == "\0" else character for character in _first]
    _Loader.add_implicit_resolver(_TAG_PREFIX + _kind, re.compile(f"^(?:{_pattern})$"), _firsts)
_Loader.add_constructor(_TAG_PREFIX + "int", _Loader.whole_number)


def plain_value(text: str) -> Any:
    """What a value of a command line, such as `0.1` or `pool`, is in YAML. Raises YamlRulesError for what is none."""
    return parse_yaml(text, "a value").data


def read_yaml(path: str | Path) -> Located:
    """Read one YAML document from a file.

    Raises YamlRulesError, naming the file, where it does not exist, is not UTF-8 text or is not safe YAML.
    """
    file = Path(path)
    if not file.exists():
        raise YamlRulesError(f"{file}: no such file")
    if not file.is_file():
        raise YamlRulesError(f"{file}: expected a YAML file, found a directory")
    if file.stat().st_size > MAX_BYTES:
        raise YamlRulesError(f"{file}: larger than {MAX_BYTES // 2**20} MiB; this is no YAML file of HybriMoE")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlRulesError(f"{file}: expected UTF-8 text, found byte {error.start} that is not") from error
    except OSError as error:
        raise YamlRulesError(f"{file}: cannot be read: {error.strerror}") from error
    return parse_yaml(text, str(file))


def parse_yaml(text: str, source: str = "<text>") -> Located:
    """Parse one YAML document; `source` is what errors name as the file."""
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            reader = _Reader(loader, source)
            data = reader.read(root, (), frozenset()) if root is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise YamlRulesError(_marked_message(error, source)) from error
    except yaml.YAMLError as error:
        raise YamlRulesError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise YamlRulesError(f"{source}: nested too deeply") from error
    return Located(data, source, reader.lines)


def _marked_message(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark is not None else ""
    reason = " ".join(part for part in (error.context, error.problem) if part)
    return f"{source}{line}: not valid YAML: {reason}"


class _Reader:
    """Turns YAML nodes into plain data and notes their lines."""

    def __init__(self, loader: _Loader, source: str) -> None:
        self.loader = loader
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        self.n_nodes = 0

    def read(self, node: yaml.Node, path: KeyPath, open_nodes: frozenset[int]) -> Any:
        self.n_nodes += 1
        self.lines.setdefault(path, node.start_mark.line + 1)
        if self.n_nodes > MAX_NODES:
            raise self._error(node, f"more than {MAX_NODES} values (aliases that expand without end?)")
        if id(node) in open_nodes:
            raise self._error(node, "an alias that contains itself")
        self._check_tag(node)
        inner = open_nodes | {id(node)}
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, path, inner)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, index), inner) for index, item in enumerate(node.value)]
        return self._read_scalar(node)

    def _read_mapping(self, node: yaml.MappingNode, path: KeyPath, open_nodes: frozenset[int]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self._read_key(key_node)
            if key in found:
                raise self._error(key_node, f"the key {key!r} appears twice")
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            found[key] = self.read(value_node, (*path, key), open_nodes)
        return found

    def _read_key(self, node: yaml.Node) -> str | int:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, "expected a plain key, found a mapping or list as key")
        if node.tag == "tag:yaml.org,2002:merge":
            raise self._error(node, "merge keys (<<) are not supported; write the keys out")
        key = self._read_scalar(node)
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise self._error(node, f"expected text as key, found {key!r}")
        return key

    def _check_tag(self, node: yaml.Node) -> None:
        if node.tag.removeprefix(_TAG_PREFIX) not in _PLAIN_TAGS[type(node)]:
            raise self._error(node, f"the tag {node.tag!r} is not allowed: expected plain data")

    def _read_scalar(self, node: yaml.Node) -> Any:
        self._check_tag(node)
        try:
            return self.loader.construct_object(node, deep=True)
        except ValueError as error:
            raise self._error(node, f"{_shown(node.value)} cannot be read: {error}") from error

    def _error(self, node: yaml.Node, message: str) -> YamlRulesError:
        return YamlRulesError(f"{self.source}:{node.start_mark.line + 1}: {message}")


def _shown(value: str) -> str:
    """A value in an error, of which a long one has only its beginning."""
    return repr(value) if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]!r}..."
