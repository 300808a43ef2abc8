"""Policies of other authors: one file, one decorator.

    @policy("sticky", balance="hybrimoe", prefetch="impact")
    class Sticky(CachePolicy):
        def __init__(self, setting: Setting, half_life: Annotated[float, Within(1.0, 1e6)] = 50.0) -> None: ...

What is decorated is one part of a policy: a class derived from ``CachePolicy`` or ``PrefetchPolicy``, or a balance
function ``(costs: LayerCosts, parameter=default, ...) -> Assignment``. The decorator makes it a part of that name, and
a preset of that name with the other parts as given. Typed arguments with defaults are its parameters.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from scheduler.balancing import BALANCE_POLICIES, Assignment, LayerCosts, add_balance
from scheduler.cache import CACHE_POLICIES
from scheduler.cache.base import CachePolicy
from scheduler.contract import watched
from scheduler.demand import Demand, Prediction
from scheduler.errors import PolicyError
from scheduler.parameters import Within, read_parameters
from scheduler.planner.policies import PRESETS, Policy, add_preset, resolve_policy
from scheduler.prefetch import PREFETCH_POLICIES
from scheduler.prefetch.base import PrefetchPolicy, Proposals
from scheduler.setting import Setting
from scheduler.streaming import Streaming

__all__ = [
    "Assignment",
    "CachePolicy",
    "Demand",
    "Extension",
    "LayerCosts",
    "Prediction",
    "PrefetchPolicy",
    "Proposals",
    "Setting",
    "Streaming",
    "Within",
    "extensions",
    "policy",
]

Kind = Literal["balance", "prefetch", "cache"]
Decorated = TypeVar("Decorated", bound=Callable[..., Any])
NAME = re.compile(r"[a-z][a-z0-9_]*")
OWN = {
    "balance": frozenset(BALANCE_POLICIES),
    "prefetch": frozenset(PREFETCH_POLICIES),
    "cache": frozenset(CACHE_POLICIES),
}


@dataclass(frozen=True, slots=True)
class Extension:
    """A part that ``policy`` registered: its name, which part it is, the preset of that name, and the source file."""

    name: str
    kind: Kind
    policy: Policy
    file: str


_EXTENSIONS: dict[str, Extension] = {}


def extensions() -> tuple[Extension, ...]:
    """Everything registered so far, in the order of registration."""
    return tuple(_EXTENSIONS.values())


def policy(
    name: str,
    *,
    balance: str | None = None,
    prefetch: str | None = None,
    cache: str | None = None,
    streaming: Streaming | None = None,
    **params: Any,
) -> Callable[[Decorated], Decorated]:
    """Registers what is decorated as a policy. The parts that are not given: balance optimal, prefetch none, cache lru.

    ``streaming``: how simulations carry a prompt's experts past the slots; without it the policy plans prompts.
    ``params``: of the preset's parts, beside the defaults. Decorating again under the same name from the same file
    replaces. Raises PolicyError for a name that is taken or no name, an unknown part, or untyped parameters.
    """

    def register(made: Decorated) -> Decorated:
        kind, file = _kind_of(name, made), inspect.getsourcefile(made) or "?"
        _check_name(name, kind, file)
        parts: dict[str, str | None] = {"balance": balance, "prefetch": prefetch, "cache": cache}
        if parts[kind] is not None:
            raise PolicyError(f"policy {name}: what is decorated is its {kind}, so {kind}={parts[kind]!r} has no place")
        _add_part(name, kind, made)
        defaults = {"balance": "optimal", "prefetch": "none", "cache": "lru"}
        wanted = "/".join(name if part == kind else parts[part] or defaults[part] for part in parts)
        found = resolve_policy(wanted, **params)
        preset = Policy(found.balance, found.prefetch, found.cache, MappingProxyType(dict(found.params)), streaming)
        add_preset(name, preset)
        _EXTENSIONS[name] = Extension(name, kind, preset, file)
        return made

    return register


def _kind_of(name: str, made: Any) -> Kind:
    if isinstance(made, type) and issubclass(made, CachePolicy):
        return "cache"
    if isinstance(made, type) and issubclass(made, PrefetchPolicy):
        return "prefetch"
    if inspect.isfunction(made):
        return "balance"
    raise PolicyError(
        f"policy {name}: decorate a class derived from CachePolicy or PrefetchPolicy, or a function; found {made!r}"
    )


def _check_name(name: str, kind: Kind, file: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PolicyError(f"a policy's name is small letters, digits and underscores, found {name!r}")
    if name in OWN[kind] or name in PRESETS:
        raise PolicyError(f"policy {name!r} is one of HybriMoE's own; choose another name")
    known = _EXTENSIONS.get(name)
    if known is not None and known.file != file:
        raise PolicyError(f"policy {name!r} of {file} is there already, from {known.file}; choose another name")


def _add_part(name: str, kind: Kind, made: Any) -> None:
    parameters = read_parameters(name, made)
    if kind == "balance":
        add_balance(name, made, parameters)
    elif kind == "prefetch":
        PREFETCH_POLICIES[name] = watched(name, made)
    else:
        CACHE_POLICIES[name] = watched(name, made)
