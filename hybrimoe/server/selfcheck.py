"""What a server tells of itself once it has answered a little: whether slots, CPU lane and link do what they are for.

A cache that never hits, or a link that takes longer than computing, fails no request; it is only slow. So after
CHECKED_TOKENS tokens one line for each of the three stands in the log, and in /health from then on. Of experts that are
read from disk /health says at once that reads have failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from typing_extensions import TypedDict

__all__ = ["CHECKED_TOKENS", "Finding", "disk_finding", "findings"]

CHECKED_TOKENS = 64
"""Generated tokens after which the counters are looked at: some hundred experts of each layer."""
BETTER_THAN_CHANCE = 1.1
"""Hits over the share of the experts that have a slot: routing without any locality gives 1."""
NEARLY_ALL = 0.95
"""With a slot for so many of the experts there is little left that could be better."""

About = Literal["cache", "cpu_lane", "link", "disk"]


class Finding(TypedDict):
    """One line of the check. good: as it should be."""

    about: About
    good: bool
    text: str


def findings(stats: Mapping[str, Any] | None) -> list[Finding]:
    """By the session's counters (`SessionStats.as_dict`), of decode steps; none before the first, or without slots."""
    counters = None if stats is None else stats.get("decode")
    if not stats or not counters or not counters["activated"]:
        return []
    if not stats["n_slots"]:
        return [_finding("cpu_lane", True, "there are no slots: the CPU computes all experts")]
    uploads = counters["transfers"] + counters["prefetches"]
    upload_us = counters["link_us"] / uploads if uploads else None
    cpu_us = counters["cpu_us"] / counters["cpu_experts"] if counters["cpu_experts"] else None
    kind = " (emulated)" if stats.get("accelerator_kind") == "emulated" else ""
    return [_cache(stats, counters), _cpu_lane(cpu_us, upload_us, counters), _link(upload_us, cpu_us, counters, kind)]


def disk_finding(failed_reads: str) -> Finding:
    """failed_reads: as `ExpertStore.failed_reads` has it."""
    return _finding("disk", False, f"{failed_reads}. Replies that needed them have ended with this error, others go on")


def _cache(stats: Mapping[str, Any], counters: Mapping[str, Any]) -> Finding:
    share, rate = stats["n_slots"] / stats["n_experts"], counters["hits"] / counters["activated"]
    told = f"{rate:.0%} of the experts that tokens asked for had a slot, with slots for {min(share, 1.0):.0%} of all"
    if not stats["slots_filled"]:
        return _finding("cache", False, "the cache is empty: no slot holds an expert")
    if share >= NEARLY_ALL or rate >= BETTER_THAN_CHANCE * share:
        return _finding("cache", True, f"the cache is engaged: {told}")
    return _finding("cache", False, f"the cache does not help: {told}; try more slots, or another scheduler.policy")


def _cpu_lane(cpu_us: float | None, upload_us: float | None, counters: Mapping[str, Any]) -> Finding:
    if cpu_us is None:
        return _finding("cpu_lane", True, "the CPU lane has nothing to do: every expert ran on the accelerator")
    share = counters["cpu_experts"] / (counters["cpu_experts"] + counters["accel_experts"])
    told = f"{share:.0%} of the experts in {cpu_us:.0f} us each"
    if upload_us is None:
        return _finding("cpu_lane", True, f"the CPU lane pays: it computed {told}, and nothing had to be uploaded")
    if cpu_us <= upload_us:
        return _finding("cpu_lane", True, f"the CPU lane pays: it computed {told}, an upload takes {upload_us:.0f} us")
    slow = f"the CPU lane is slow: it computed {told}, an upload takes {upload_us:.0f} us"
    return _finding("cpu_lane", False, f"{slow}; see cpu.threads and cpu.expert_dtype")


def _link(upload_us: float | None, cpu_us: float | None, counters: Mapping[str, Any], kind: str) -> Finding:
    if upload_us is None:
        if counters["misses"]:
            why = "computing a missing expert on the CPU is expected to be sooner done"
            return _finding("link", True, f"uploads are off: {why}")
        return _finding("link", True, "the link has nothing to do: every expert had a slot")
    n_uploads = counters["transfers"] + counters["prefetches"]
    told = f"{n_uploads} uploads in {upload_us:.0f} us each{kind}"
    used, wasted = counters["prefetches_used"], counters["prefetches_wasted"]
    if wasted > used and cpu_us is not None and upload_us > cpu_us:
        return _finding("link", False, f"the link is too slow for prefetching: {told}, most of them not used in time")
    return _finding("link", True, f"the link is in use: {told}")


def _finding(about: About, good: bool, text: str) -> Finding:
    return {"about": about, "good": good, "text": text}
