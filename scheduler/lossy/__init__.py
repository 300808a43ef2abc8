"""Lossy policies between router and planner, opt-in, each with its formula and source.

A lossy policy is written as a mapping: ``{"kind": "hobbit", "t1": 0.6, ...}``. Beside the parameters of its class it
may have those of ``LowCopy`` where it uses low-precision copies of the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final

from scheduler.errors import PolicyError, did_you_mean
from scheduler.lossy.base import DEFERRED, FULL, LOW, LossyPolicy, LossySetting, Rewritten, Routing
from scheduler.lossy.bit_width import BitWidth
from scheduler.lossy.deferral import Defer
from scheduler.lossy.hobbit import Hobbit
from scheduler.lossy.kept import EMoe, SwapMoe
from scheduler.lossy.misses import Skip, Substitute
from scheduler.lossy.planes import D2Moe
from scheduler.machine.profile import BYTES_PER_WEIGHT
from scheduler.setting import choice, number, parameters_of

__all__ = [
    "DEFERRED",
    "FULL",
    "LOSSY_POLICIES",
    "LOW",
    "Lossy",
    "LossyPolicy",
    "LossySetting",
    "LowCopy",
    "Rewritten",
    "Routing",
    "resolve_lossy",
]

LOSSY_POLICIES: Final[Mapping[str, type[LossyPolicy]]] = MappingProxyType(
    {kind.name: kind for kind in (Hobbit, Skip, Substitute, SwapMoe, EMoe, BitWidth, Defer, D2Moe)}
)


CHECKED_EXPERTS: Final = 256
"""Experts of the one-layer model for which parameters are tried before a real model is known."""


@dataclass(frozen=True, slots=True)
class LowCopy:
    """The low-precision copy: its dtype, and the share of the slot memory that its own slots take."""

    low_dtype: str = "int4"
    low_share: float = 0.25

    def __post_init__(self) -> None:
        choice("low copy", "low_dtype", self.low_dtype, tuple(BYTES_PER_WEIGHT))
        number("low copy", "low_share", self.low_share, 0.0, 1.0)

    def split(self, n_slots: int, high_bytes: int, low_bytes: int, n_experts: int) -> tuple[int, int]:
        """(full-precision slots, low slots) in the memory of ``n_slots`` full-precision slots.

        The low ones get ``low_share`` of it, at most one slot an expert; what they leave is the others'. A memory of
        one slot or more holds at least one full-precision slot.
        """
        total_bytes = n_slots * high_bytes
        n_low = min(int(self.low_share * total_bytes) // low_bytes, n_experts)
        n_high = (total_bytes - n_low * low_bytes) // high_bytes
        return (1, 0) if n_slots and not n_high else (n_high, n_low)


@dataclass(frozen=True, slots=True)
class Lossy:
    """A checked lossy policy: ``make`` builds its lossy policy for a model. ``low``: None where it needs no copy."""

    kind: str
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    low: LowCopy | None = None

    @property
    def needs_expert_norms(self) -> bool:
        """Whether the lossy policy wants ``LossySetting.expert_norms``."""
        return LOSSY_POLICIES[self.kind].needs_expert_norms

    @property
    def uses_planes(self) -> bool:
        """Whether experts cross the link as bit planes."""
        return LOSSY_POLICIES[self.kind].uses_planes

    @property
    def one_copy(self) -> bool:
        """Whether each expert is used in one precision only."""
        return LOSSY_POLICIES[self.kind].one_copy

    def make(self, setting: LossySetting) -> LossyPolicy:
        """The lossy policy for one model. Raises PolicyError where parameters do not fit it."""
        return LOSSY_POLICIES[self.kind](setting, **self.params)

    @property
    def name(self) -> str:
        """Kind and the parameters that were given, as summaries and tables show it."""
        told = {**self.params, **({} if self.low is None else {"low_dtype": self.low.low_dtype})}
        return self.kind + (f" ({', '.join(f'{key}={value}' for key, value in told.items())})" if told else "")


def resolve_lossy(given: str | Mapping[str, Any] | None) -> Lossy | None:
    """A kind, or a mapping with ``kind`` and parameters; None and "none" mean lossless (None).

    Raises PolicyError with did-you-mean for unknown kinds and parameters, and for values outside their range.
    """
    if given is None or given == "none":
        return None
    mapping = {"kind": given} if isinstance(given, str) else given
    if not isinstance(mapping, Mapping) or not isinstance(mapping.get("kind"), str):
        raise PolicyError(f"lossy: expected a kind, or a mapping such as {{kind: hobbit, t1: 0.6}}, found {given!r}")
    kind = mapping["kind"]
    if kind == "none" and len(mapping) == 1:
        return None
    if kind not in LOSSY_POLICIES:
        raise PolicyError(f"lossy: unknown kind {kind!r}{did_you_mean(kind, (*LOSSY_POLICIES, 'none'))}")
    maker = LOSSY_POLICIES[kind]
    of_copy = {item.name for item in fields(LowCopy)} if maker.uses_low_copy else set()
    known = parameters_of(maker) | of_copy
    for name in mapping:
        if name != "kind" and name not in known:
            raise PolicyError(f"lossy {kind}: unknown parameter {name!r}{did_you_mean(str(name), known)}")
    params = {key: value for key, value in mapping.items() if key != "kind" and key not in of_copy}
    copied: dict[str, Any] = {key: mapping[key] for key in of_copy if key in mapping}
    low = LowCopy(**copied) if maker.uses_low_copy else None
    budget = params.get("budget")
    maker(LossySetting(1, max(CHECKED_EXPERTS, budget if isinstance(budget, int) else 0)), **params)
    return Lossy(kind, MappingProxyType(params), low)
