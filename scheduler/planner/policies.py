"""Named policies: triples of balance, prefetch and cache, with the parameters that make them their source's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from scheduler.balancing import balance_names, kernel_of, parameters_of_balance
from scheduler.cache import CACHE_POLICIES
from scheduler.errors import PolicyError, did_you_mean
from scheduler.future import Future
from scheduler.machine.costs import CostModel
from scheduler.parameters import Parameter, check_values, read_parameters
from scheduler.prefetch import PREFETCH_POLICIES
from scheduler.setting import Setting, make
from scheduler.slots import SlotTable
from scheduler.streaming import Streaming


@dataclass(frozen=True, slots=True)
class Policy:
    """``params`` are handed to those of the three that know them; see the classes for names and ranges.

    ``streaming``: how a prompt's experts reach the accelerator beside the slots, where that is part of the system; the
    planner does not read it, simulations do.
    """

    balance: str
    prefetch: str
    cache: str
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    streaming: Streaming | None = None

    @property
    def name(self) -> str:
        """``balance/prefetch/cache``."""
        return f"{self.balance}/{self.prefetch}/{self.cache}"


def _policy(balance: str, prefetch: str, cache: str, **params: Any) -> Policy:
    return Policy(balance, prefetch, cache, MappingProxyType(params))


_PRESETS: dict[str, Policy] = {
    "static": _policy("static", "none", "lfu", scope="pool"),
    "llama_cpp": Policy("layers", "none", "shallow_first", streaming=Streaming(min_tokens=32)),
    "moe_infinity": _policy("on_demand", "activation_matrix", "activation_matrix"),
    "fiddler": _policy("fiddler", "none", "lfu", scope="pool"),
    "freetoken": _policy("bandwidth", "none", "lru", scope="pool"),
    "adapmoe": _policy("on_demand", "gate_topk", "lru", sizes="dp", depth=1),
    "hobbit": _policy("on_demand", "gate_topk", "hobbit", depth=3, only_if_cached=True),
    "fate": _policy("on_demand", "gate_topk", "arc", depth=1, share=0.75, n_shallow=2),
    "promoe": _policy("on_demand", "gate_topk", "lru", depth=3, pieces=4),
    "hybrimoe": _policy("hybrimoe", "impact", "mrs"),
    "hybrimoe_released": _policy("hybrimoe_released", "impact", "mrs"),
    "ours": _policy("value", "value", "value"),
    "oracle": _policy("optimal", "perfect", "belady"),
}
"""static: KTransformers (most frequent experts resident by profile, never moved). llama_cpp: --n-cpu-moe (whole
layers; batches of at least 32 tokens upload the experts that they need: its pull requests 13386 and 15346).
moe_infinity: arXiv 2401.14361. fiddler: arXiv 2402.07033. freetoken: arXiv 2608.16157. adapmoe: arXiv
2408.10284. hobbit: arXiv 2411.01433, its lossless part. fate: arXiv 2502.12224. promoe: arXiv 2410.22134
(predictions ``hidden`` give it its learned predictor). hybrimoe: arXiv 2504.05897;
hybrimoe_released: with the balance of its published code, which its figures were measured with."""
PRESETS: tuple[str, ...] = tuple(_PRESETS)
"""Names of those that are in the package; ``add_preset`` adds others."""
POLICIES: Mapping[str, Policy] = MappingProxyType(_PRESETS)
"""All presets there are now."""


def add_preset(name: str, policy: Policy) -> None:
    """Gives a policy a name, in place of an earlier one of that name. Raises PolicyError for one of PRESETS."""
    if name in PRESETS:
        raise PolicyError(f"policy {name!r} is one of HybriMoE's own; choose another name")
    _PRESETS[name] = policy


def policy_parameters(policy: Policy) -> dict[str, Parameter]:
    """The parameters of the three parts by name."""
    return {
        **parameters_of_balance(policy.balance),
        **read_parameters(policy.prefetch, PREFETCH_POLICIES[policy.prefetch]),
        **read_parameters(policy.cache, CACHE_POLICIES[policy.cache]),
    }


def resolve_policy(policy: str | Policy, **params: Any) -> Policy:
    """A preset's name or ``balance/prefetch/cache``, with parameters on top. Raises PolicyError with did-you-mean."""
    found = policy if isinstance(policy, Policy) else _by_name(policy)
    if not params:
        return found
    values = check_values(found.name, policy_parameters(found), params)
    merged = replace(found, params=MappingProxyType({**found.params, **values}))
    _check_values(merged)
    return merged


def _check_values(policy: Policy) -> None:
    """Makes the three policies once for a model of one expert, so that bad values are refused here."""
    known = parameters_of_balance(policy.balance)
    kernel_of(policy.balance, **{key: value for key, value in policy.params.items() if key in known})
    toy = Setting(1, 1, SlotTable(1, 1, 1), CostModel.uniform(1), future=Future([], 1, 1))
    make("prefetch", policy.prefetch, PREFETCH_POLICIES, toy, policy.params)
    make("cache", policy.cache, CACHE_POLICIES, toy, policy.params)


def _by_name(name: str) -> Policy:
    if not isinstance(name, str):
        raise PolicyError(f"a policy is a preset's name or balance/prefetch/cache, found {name!r}")
    if name in POLICIES:
        return POLICIES[name]
    parts = name.split("/")
    if len(parts) != 3:
        raise PolicyError(f"unknown policy {name!r}{did_you_mean(name, POLICIES)}, or write balance/prefetch/cache")
    tables: tuple[tuple[str, Any], ...] = (
        ("balance", balance_names()), ("prefetch", PREFETCH_POLICIES), ("cache", CACHE_POLICIES)
    )  # fmt: skip
    for part, (kind, table) in zip(parts, tables, strict=True):
        if part not in table:
            raise PolicyError(f"policy {name!r}: unknown {kind} policy {part!r}{did_you_mean(part, table)}")
    return Policy(parts[0], parts[1], parts[2])
