"""Cache and prefetch policies of other authors: every answer is checked where it is given, every error is named.

``watched`` derives a class whose methods call the author's and look at what came of it. HybriMoE's own policies run
without: their tests look.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np

from scheduler.cache.base import CachePolicy
from scheduler.demand import Demand
from scheduler.errors import PolicyError, SchedulerError
from scheduler.prefetch.base import PrefetchPolicy, Proposals

Part = TypeVar("Part", bound=type[CachePolicy] | type[PrefetchPolicy])
CACHE_METHODS = ("begin_sequence", "warmed", "observe", "refresh", "admits", "inserted", "evicted", "resized")
PREFETCH_METHODS = ("begin_sequence", "observe", "propose")


def watched(name: str, part: Part) -> Part:
    """A class like ``part`` that raises PolicyError, with the policy's name, where one of its methods raises or breaks
    the contract of ``CachePolicy`` or ``PrefetchPolicy``."""
    is_cache = issubclass(part, CachePolicy)
    base, methods = (CachePolicy, CACHE_METHODS) if is_cache else (PrefetchPolicy, PREFETCH_METHODS)
    own: dict[str, Any] = {"__module__": part.__module__, "__doc__": part.__doc__, "__qualname__": part.__qualname__}
    check = _check_cache if is_cache else None
    for method in ("__init__", *methods):
        found = getattr(part, method)
        if method == "__init__" or found is not getattr(base, method):
            own[method] = _watch(f"{'cache' if is_cache else 'prefetch'} {name}", found, check)
    if not is_cache:
        if "propose" not in own:
            raise PolicyError(f"prefetch {name} has no method propose(demand, limit)")
        own["propose"] = _checked_proposals(f"prefetch {name}", own["propose"])
    return cast(Part, type(part.__name__, (part,), own))


def _watch(where: str, method: Callable[..., Any], check: Callable[[str, Any], None] | None) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            answer = method(self, *args, **kwargs)
        except SchedulerError:
            raise
        except Exception as error:  # another author's code: whatever it raises, it must be named
            raise PolicyError(f"{where} raised {type(error).__name__} in {method.__name__}: {error}") from error
        if check is not None:
            check(f"{where} breaks the contract in {method.__name__}", self)
        return answer

    return call


def _check_cache(where: str, cache: CachePolicy) -> None:
    setting, keep = cache.setting, cache.keep
    if not isinstance(keep, np.ndarray) or keep.dtype != np.float64 or keep.shape != (setting.n_keys,):
        found = f"{keep.dtype}{list(keep.shape)}" if isinstance(keep, np.ndarray) else repr(keep)
        raise PolicyError(f"{where}: keep must be float64[{setting.n_keys}], one number an expert; found {found}")
    if np.isnan(keep).any():
        layer, expert = divmod(int(np.isnan(keep).argmax()), setting.n_experts)
        raise PolicyError(f"{where}: keep is NaN for expert {expert} of layer {layer}; expected a number")
    if cache.scope not in ("layer", "pool"):
        raise PolicyError(f"{where}: scope must be 'layer' or 'pool', found {cache.scope!r}")
    sizes = np.asarray(cache.capacities)
    if sizes.shape != (setting.n_layers,) or sizes.dtype.kind not in "iu" or (sizes < 0).any():
        raise PolicyError(f"{where}: capacities must be {setting.n_layers} integers of at least 0, found {sizes}")
    if cache.scope == "layer" and int(sizes.sum()) > setting.slots.n_slots:
        raise PolicyError(f"{where}: capacities {sizes.tolist()} are more than the {setting.slots.n_slots} slots")


def _checked_proposals(where: str, propose: Callable[..., Any]) -> Callable[..., Proposals]:
    @wraps(propose)
    def call(self: PrefetchPolicy, demand: Demand, limit: int) -> Proposals:
        answer = propose(self, demand, limit)
        problem = _problem_of(self, demand, limit, answer)
        if problem:
            raise PolicyError(f"{where} breaks the contract at layer {demand.layer}: {problem}; it proposed {answer}")
        keys, gains = answer
        return keys.astype(np.int64, copy=False), gains.astype(np.float64, copy=False)

    return call


def _problem_of(policy: PrefetchPolicy, demand: Demand, limit: int, answer: Any) -> str:
    """What is wrong with proposals, in words; empty where nothing is."""
    setting = policy.setting
    if not isinstance(answer, tuple) or len(answer) != 2 or not all(isinstance(part, np.ndarray) for part in answer):
        return "propose must return two arrays, keys and gains in us"
    keys, gains = answer
    if keys.ndim != 1 or keys.shape != gains.shape or keys.dtype.kind not in "iu" or gains.dtype.kind != "f":
        found = f"{keys.dtype}{list(keys.shape)} and {gains.dtype}{list(gains.shape)}"
        return f"keys must be integers [n] and gains floats [n], found {found}"
    if keys.size > limit:
        return f"at most {limit} transfers fit before the next layer"
    if not keys.size:
        return ""
    first = (demand.layer + 1) * setting.n_experts
    if int(keys.min()) < first or int(keys.max()) >= setting.n_keys:
        return f"keys must be of later layers, {first}..{setting.n_keys - 1}"
    if np.unique(keys).size != keys.size:
        return "a key stands twice"
    if (setting.slots.slot_of[keys] >= 0).any():
        return f"keys {keys[setting.slots.slot_of[keys] >= 0].tolist()} have a slot already"
    return "" if np.isfinite(gains).all() else "gains must be finite"
