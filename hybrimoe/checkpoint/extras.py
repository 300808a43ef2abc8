"""Weights that a checkpoint has and its model has no place for, and that are left out by rule."""

from __future__ import annotations

import re
from collections.abc import Iterable

SCALE = re.compile(r"(^|[._])(input|activation|output|[kqv]|kv|prob)_scale(_ub|_inv)?$|\.qscale_act$")
PREDICTION = re.compile(r"(^|\.)(mtp|mtp_layers|nextn)\.")
LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
OTHER_STACKS = re.compile(r"vision|visual|audio|encoder")  # have layers of their own, which num_hidden_layers is not of


def left_out(keys: Iterable[str], num_hidden_layers: int) -> dict[str, list[str]]:
    """The keys that may be left out, by what they are."""
    found: dict[str, list[str]] = {}
    for key in sorted(keys):
        if (what := _what(key, num_hidden_layers)) is not None:
            found.setdefault(what, []).append(key)
    return found


def _what(key: str, num_hidden_layers: int) -> str | None:
    if SCALE.search(key):
        return "scales of activations and of the KV cache"
    if PREDICTION.search(key):
        return "layers that predict several tokens"
    layer = LAYER.search(key)
    if layer and int(layer[2]) >= num_hidden_layers and not OTHER_STACKS.search(key):
        return f"layers beyond num_hidden_layers={num_hidden_layers} of config.json"
    return None
