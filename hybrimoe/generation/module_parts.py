"""Which part of a step each module of a model is, and hooks that time the modules while a reply is profiled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["module_parts", "timed_modules"]

ROUTER_NAME = re.compile(r"(gate|router|classifier)$")
"""Last name of a router that is called beside its experts."""
ATTENTION_KIND = re.compile(r"Attention|DeltaNet|Mamba|Mixer|ShortConv|RotaryEmbedding")
"""Classes whose own work is attention, or what stands in its place (linear attention, state spaces, convolutions)."""


def module_parts(model: nn.Module) -> dict[str, str]:
    """The part of each module by path; modules without an entry (decoder layers, lists) belong to whatever calls them.

    A module's time is its own: that of modules inside it goes to their parts. Parts are told by what a module is (its
    class, whether it has a matrix, what it stands beside), never by the model's name.
    """
    modules = dict(model.named_modules())
    output = getattr(model, "get_output_embeddings", lambda: None)()
    blocks = {path.rpartition(".")[0] for path, module in modules.items() if _is_experts(module)}
    parts: dict[str, str] = {}
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        above = _nearest(parts, parent)
        if not path or above in ("experts", "router", "output_layer"):
            continue  # what is inside belongs to it as a whole
        kind = type(module).__name__
        if module is output:
            parts[path] = "output_layer"
        elif _is_experts(module):
            parts[path] = "experts"
        elif parent in blocks and (ROUTER_NAME.fullmatch(path.rpartition(".")[2]) or kind.endswith("Router")):
            parts[path] = "router"
        elif "Norm" in kind:
            parts[path] = "norms"
        elif ATTENTION_KIND.search(kind):
            parts[path] = "attention"
        elif _has_matrix(module):
            parts[path] = "projections" if above in ("attention", "projections") else "shared_experts"
        elif parent in blocks or (kind.endswith("MLP") and path not in blocks):
            parts[path] = "shared_experts"
    return parts


def _is_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts")


def _nearest(parts: dict[str, str], path: str) -> str | None:
    """The part of the module at `path`, or of the nearest one around it that has one."""
    while path:
        if path in parts:
            return parts[path]
        path = path.rpartition(".")[0]
    return None


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies with a matrix: any kind of linear layer, packed or not; no embedding."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


@contextmanager
def timed_modules(
    model: nn.Module, parts: dict[str, str], begin: Callable[[str], None], end: Callable[[], None]
) -> Iterator[None]:
    """Within the block, `begin(part)` is called before and `end()` after each call of a module that has a part.

    The compiled step knows these hooks by this module's name and runs in spite of them: they have nothing to time then.
    """
    handles = []
    try:
        for path, module in model.named_modules():
            if path in parts:
                handles.append(module.register_forward_pre_hook(_before(begin, parts[path])))
                handles.append(module.register_forward_hook(_after(end), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(begin: Callable[[str], None], part: str) -> Callable[..., None]:
    def before_call(module: nn.Module, args: Any) -> None:
        begin(part)

    return before_call


def _after(end: Callable[[], None]) -> Callable[..., None]:
    def after_call(module: nn.Module, args: Any, output: Any) -> None:
        end()

    return after_call
