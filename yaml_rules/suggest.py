"""Did-you-mean: the one home of "unknown X" messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED_AT_MOST = 20
_CUTOFF = 0.55


def nearest(name: str, candidates: Iterable[str], count: int = 1) -> list[str]:
    """Return up to `count` candidates that look like `name`, best first; case is ignored, ties are broken by name."""
    by_folded = {candidate.casefold(): candidate for candidate in sorted(candidates, reverse=True)}
    folded = sorted(by_folded)
    matches = difflib.get_close_matches(name.casefold(), folded, n=count, cutoff=_CUTOFF)
    if not matches:
        matches = [candidate for candidate in folded if name.casefold() and name.casefold() in candidate][:count]
    return [by_folded[match] for match in matches]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the candidate nearest to `name`, or an empty text where none is near."""
    found = nearest(name, candidates)
    return f"; did you mean {found[0]!r}?" if found else ""


def unknown(kind: str, name: str, candidates: Iterable[str]) -> str:
    """Return "unknown <kind> '<name>'; did you mean ...? (known: ...)".

    >>> unknown("operator", "hybrid_expert", ["default", "hybrid_experts"])
    "unknown operator 'hybrid_expert'; did you mean 'hybrid_experts'? (known: default, hybrid_experts)"
    """
    names = sorted(candidates)
    shown = ", ".join(names[:_LISTED_AT_MOST]) + (", ..." if len(names) > _LISTED_AT_MOST else "")
    return f"unknown {kind} {name!r}{did_you_mean(name, names)} (known: {shown or 'none'})"
