"""The sections, in the order of `SECTIONS`. A module each with `run(setting, findings)`; only the one that runs is
imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrimoe.errors import ConfigError, unknown


@dataclass(frozen=True, slots=True)
class Section:
    """seconds, quick_seconds: its part of a budget of 9 and of 3 minutes; what it does not use goes to the later ones.
    The first ones compile what all need: on a machine that has never run HybriMoE more than a minute.
    alone: it takes times or memory, so nothing else may run beside it."""

    name: str
    title: str
    seconds: int
    quick_seconds: int
    alone: bool = True
    module: str = ""

    @property
    def module_name(self) -> str:
        """Where `run` is."""
        return self.module or f"{__name__}.{self.name}"


SECTIONS = (
    Section("ends", "A program with the accelerator ends", 140, 110, alone=False),
    Section("tests", "The tests that need a card", 140, 110, alone=False),
    Section("races", "Memory errors and races by compute-sanitizer", 140, 110, alone=False),
    Section("parity", "The same logits and tokens as on the CPU", 140, 110, alone=False),
    Section("lost_copy", "A copy that fails", 140, 110, alone=False),
    Section("kernels", "Kernels against the card's own memory rate", 70, 20),
    Section("link", "Link and latencies", 25, 8),
    Section("overlap", "Overlap, waits and launches of a decode step", 60, 22),
    Section("memory", "Memory: the plan and what the device holds", 35, 10),
    Section("no_memory", "Out of memory in a prompt", 35, 10),
    Section("speed", "Tokens a second by share of slots, beside transformers", 165, 30),
)


def chosen(names: Sequence[str] | None) -> tuple[Section, ...]:
    """The sections of these names, in their order; all where none is named. Raises ConfigError for unknown ones."""
    known = [section.name for section in SECTIONS]
    for name in names or ():
        if name not in known:
            raise ConfigError(unknown("section", name, known))
    return tuple(section for section in SECTIONS if not names or section.name in names)
