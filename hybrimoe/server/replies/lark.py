"""Parts of Lark grammars for a model's tokenizer, where a marker is a special token or plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hybrimoe.generation.constraint import in_lark
from hybrimoe.server.replies.events import Tool

__all__ = ["MOST_CALLS", "Lark", "arguments_schema", "special_tokens"]

MOST_CALLS = 16
"""Calls in one reply that must have some: a model that does not end by itself does not go on for ever."""


@dataclass(frozen=True, slots=True)
class Lark:
    """specials: ids of special tokens by name; within a grammar they are no text."""

    specials: Mapping[str, int]

    def text(self, text: str) -> str:
        """An expression for exactly `text`, in which names of special tokens stand for those."""
        if not self.specials:
            return json.dumps(text, ensure_ascii=False)
        names = "|".join(re.escape(name) for name in sorted(self.specials, key=len, reverse=True))
        parts = [part for part in re.split(f"({names})", text) if part]
        return " ".join(
            f"<[{self.specials[part]}]>" if part in self.specials else json.dumps(part, ensure_ascii=False)
            for part in parts
        )

    def up_to(self, rule: str, marker: str) -> str:
        """A rule for any text, and `marker` after it."""
        if marker in self.specials:
            return f"{rule}: /(.|\\n)*/ {self.text(marker)}\n"
        return f"{rule}[suffix={json.dumps(marker, ensure_ascii=False)}]: /(.|\\n)*/\n"

    def without(self, rule: str, markers: Iterable[str]) -> str:
        """A terminal for any text in which none of `markers` begins; special tokens are no text anyway."""
        plain = [marker for marker in markers if marker not in self.specials]
        excluded = "".join(f" & ~/(.|\\n)*{_in_a_pattern(marker)}(.|\\n)*/" for marker in plain)
        return f"{rule}: /(.|\\n)*/{excluded}\n"


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that give no text, by name."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {str(token.content): int(index) for index, token in added.items() if token.special}
    return names | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments: an object, without names that the schema does not list unless it says so."""
    schema = {"type": "object", **tool.parameters}
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def call_objects(tools: Iterable[Tool], arguments: str) -> str:
    """An expression for a JSON object with a tool's name and its arguments under the key `arguments`."""
    return " | ".join(
        in_lark(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, arguments: arguments_schema(tool)},
                "required": ["name", arguments],
                "additionalProperties": False,
            }
        )
        for tool in tools
    )


def _in_a_pattern(text: str) -> str:
    return "".join(one if one.isalnum() else f"\\x{{{ord(one):x}}}" for one in text)
