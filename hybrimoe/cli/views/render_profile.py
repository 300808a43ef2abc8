"""Where a token's time went: the table of `--profile`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from hybrimoe.cli.views import render, render_summary

WORDS = {
    "norms": "norms",
    "projections": "projections",
    "attention": "attention",
    "router": "router",
    "planning": "planning and dispatch",
    "experts_cpu": "experts: CPU",
    "experts_disk": "experts: waiting for the disk",
    "experts_accelerator": "experts: accelerator",
    "experts_link": "experts: waiting for the link",
    "shared_experts": "shared experts, dense MLP",
    "output_layer": "output layer",
    "sampling": "sampling",
    "detokenising": "detokenising",
    "caller": "showing the text",
    "framework": "framework (the rest)",
}
"""Parts in the order in which they are shown, and what they are called."""


def profile_table(profile: Mapping[str, Any], label: str) -> Table:
    """`Profile.as_dict()` as a table: a token's time by part, for prompt and reply; parts without time are left out.

    label: how the times came about, as `render_summary.provenance`.
    """
    phases = {name: phase for name, phase in profile.items() if phase["tokens"]}
    columns = ["part of a token's time"]
    for name in phases:
        columns += [f"{name}, ms", "%"]
    rows = [
        [words, *(cell for phase in phases.values() for cell in _cells(phase, phase["parts_us"][part]))]
        for part, words in WORDS.items()
        if any(phase["parts_us"][part] for phase in phases.values())
    ]
    total = ["all", *(cell for phase in phases.values() for cell in _cells(phase, phase["us"]))]
    told = ", ".join(f"{phase['tokens']} tokens of {name}" for name, phase in phases.items())
    return render.table(f"{label}: {told}", columns, [*rows, total])


def _cells(phase: Mapping[str, Any], us: float) -> tuple[str, str]:
    """Milliseconds a token, and the share of the phase."""
    return f"{us / phase['tokens'] / 1e3:.3f}", render_summary.percent(us / phase["us"])
