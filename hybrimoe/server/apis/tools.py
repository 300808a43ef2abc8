"""Tools and their calls, as the APIs have them in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from hybrimoe.server.errors import RequestError
from hybrimoe.server.fields import json_throughout, shown
from hybrimoe.server.replies.events import Tool
from hybrimoe.server.replies.syntax import ToolUse

__all__ = ["MAX_TOOLS", "TOOL_NAME", "called", "new_tool", "only_functions", "tool_use"]

MAX_TOOLS = 512
TOOL_NAME = r"^[a-zA-Z0-9_.:/-]{1,128}$"
"""OpenAI's names, and the dots and colons that agents put between a server of tools and its tool."""


def called(id_: str | None, name: str, arguments: str) -> dict[str, Any]:
    """A call of an earlier reply as chat templates read it."""
    try:
        data = json_throughout(json.loads(arguments))
    except (ValueError, RecursionError):
        data = arguments
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": data}}


def new_tool(name: str, description: str | None, parameters: dict[str, Any] | None, *, strict: bool = False) -> Tool:
    """A tool whose schema is that of an object without arguments where there is none.

    Raises RequestError for the schema of anything else: a call has named arguments.
    """
    plain = Tool(name, description or "", strict=strict)
    if not parameters:
        return plain
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise RequestError(
            f"tools: the parameters of {name!r} must be the schema of an object, found the type {shown(kind)}", "tools"
        )
    return replace(plain, parameters={**parameters, "type": "object"})


def only_functions(value: object) -> object:
    """A clearer message for tools that run at the provider's."""
    kind = value.get("type") if isinstance(value, dict) else "function"
    if kind != "function":
        raise ValueError(f"type: this server has no support for tools of the type {shown(kind)}; expected function")
    return value


def tool_use(
    tools: Sequence[Tool], choice: Literal["auto", "none", "required"], named: str | None, *, many: bool
) -> ToolUse:
    """Raises RequestError where the choice is none of the tools, or two have one name."""
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("tools: two of them have the same name", "tools")
    if choice == "required" and not tools:
        raise RequestError("tool_choice: there are no tools to call; send tools, or leave it out", "tool_choice")
    if named is not None and named not in names:
        raise RequestError(f"tool_choice: no tool has the name {shown(named)}", "tool_choice")
    return ToolUse(tuple(tools), choice, named, many and named is None)
