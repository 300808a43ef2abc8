"""Prometheus metrics of a server, in a registry of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from hybrimoe.generation import Reply
    from hybrimoe.generation.prefix.blocks import PrefixTree
    from hybrimoe.server.models import Models

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counts of requests and tokens, times to the first and between tokens, and the expert cache's own counters."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self._models = models
        new: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("hybrimoe_requests", "Requests by path and status.", ["path", "status"], **new)
        self._prompt = Counter("hybrimoe_prompt_tokens", "Prompt tokens.", **new)
        self._reused = Counter("hybrimoe_prompt_tokens_reused", "Prompt tokens that came from the KV cache.", **new)
        self._generated = Counter("hybrimoe_generated_tokens", "Generated tokens.", **new)
        self._ttft = Histogram(
            "hybrimoe_ttft_seconds", "Time to the first token, waiting in the queue included.", buckets=SECONDS, **new
        )
        self._tbt = Histogram("hybrimoe_tbt_seconds", "Time between tokens.", buckets=SECONDS, **new)
        self._drafted = Counter("hybrimoe_drafted_tokens", "Tokens drafted by speculation and computed.", **new)
        self._accepted = Counter("hybrimoe_accepted_tokens", "Drafted tokens that were right: steps saved.", **new)
        self._queue = Histogram(
            "hybrimoe_queue_seconds", "Time in the queue, of requests that were answered.", buckets=SECONDS, **new
        )
        waiting = Gauge("hybrimoe_requests_waiting", "Requests in the queue.", **new)
        waiting.set_function(lambda: models.n_waiting)
        running = Gauge("hybrimoe_requests_running", "Requests that are being answered.", **new)
        running.set_function(lambda: models.n_running)
        wanting = Gauge("hybrimoe_requests_waiting_for_model", "Requests whose model is not in memory.", **new)
        wanting.set_function(lambda: models.n_waiting_for_model)
        self._loaded = Gauge("hybrimoe_model_loaded", "1: the model is in memory.", ["model"], **new)
        loads = Gauge("hybrimoe_model_loads", "Loads of a model into memory, so far.", **new)
        loads.set_function(lambda: models.n_loads)
        resident = Gauge("hybrimoe_resident_bytes", "Memory of the server's process that is in use.", **new)
        resident.set_function(lambda: psutil.Process().memory_info().rss)
        self._steps = Gauge("hybrimoe_decode_steps", "Steps that gave a token to each running reply, so far.", **new)
        self._parallel = Gauge(
            "hybrimoe_requests_parallel", "Replies at once at most; way: in one step, or in turn, and why.",
            ["way", "reason"], **new,
        )  # fmt: skip
        self._part = Gauge(
            "hybrimoe_prompt_part_tokens", "Tokens of a prompt between two tokens of the others; 0: no limit.", **new
        )
        self._prefix_budget = Gauge(
            "hybrimoe_prefix_cache_max_bytes", "Memory that the prefix cache may take; reason: why it keeps nothing.",
            ["reason"], **new,
        )  # fmt: skip
        self._prefixes = {
            name: Gauge(f"hybrimoe_prefix_cache_{name}", words, **new)
            for name, words in {
                "hits": "Prompts whose beginning was kept, so far.",
                "misses": "Prompts of which nothing was kept, so far.",
                "bytes": "Memory that kept tokens take.",
                "blocks": "Blocks of up to 64 tokens that are kept.",
                "evictions": "Blocks that made room for others, so far.",
            }.items()
        }
        self._prefix_disk_budget = Gauge(
            "hybrimoe_prefix_cache_disk_max_bytes",
            "What the disk level may take; reason: why nothing is written.", ["reason"], **new,
        )  # fmt: skip
        self._prefixes_on_disk = {
            name: Gauge(f"hybrimoe_prefix_cache_disk_{name}", words, **new)
            for name, words in {
                "bytes": "What the files of the disk level take.",
                "files": "Blocks and states that are kept on disk.",
                "read_tokens": "Prompt tokens that came from disk, so far.",
                "read_bytes": "Bytes read, so far.",
                "written_bytes": "Bytes written, so far.",
                "evictions": "Files that made room for others, so far.",
                "damaged": "Files that were not as they had been written, and were deleted, so far.",
                "left_out": "Blocks and states that memory gave up faster than the disk took them, so far.",
            }.items()
        }
        self._gauges = {
            name: Gauge(f"hybrimoe_expert_{name}", words, **new)
            for name, words in {
                "hits": "Activated experts that were resident.",
                "misses": "Activated experts that were not resident.",
                "transfers": "Demand transfers.",
                "prefetches": "Prefetches.",
                "transfer_bytes": "Bytes moved to the accelerator.",
                "hit_rate": "Hits over activated experts.",
                "cpu_us": "Busy time of the CPU lane.",
                "accel_us": "Busy time of the accelerator lane.",
                "link_us": "Busy time of the link.",
                "disk_reads": "Experts that a call needed and that were read from disk then.",
                "disk_ahead": "Experts that were read from disk before a call needed them.",
                "disk_bytes": "Bytes read from disk.",
                "disk_us": "Time of all reads from disk.",
                "disk_wait_us": "Time in which the CPU lane waited for reads from disk.",
                "routed": "Under a lossy policy: (token, expert) pairs that the router asked for; 0 if lossless.",
                "skipped": "Routed pairs that a lossy policy left out.",
                "substituted": "Routed pairs for which another expert was computed.",
                "lowered": "Routed pairs that were computed in low precision.",
                "deferred": "Routed pairs whose result came one layer late.",
            }.items()
        }

        self._by_accelerator = {
            name: Gauge(f"hybrimoe_accelerator_{name}", words, ["accelerator", "name"], **new)
            for name, words in {
                "n_slots": "Slots for experts.",
                "n_layers": "MoE layers whose experts it holds.",
                "accel_us": "Busy time of its compute lane.",
                "link_us": "Busy time of its link.",
                "hit_rate": "Hits over activated experts of its layers.",
                "transfer_bytes": "Bytes moved to it.",
            }.items()
        }

    def observe(self, reply: Reply, waited_s: float = 0.0) -> None:
        """Count a finished reply, which had waited so many seconds before it began."""
        self._queue.observe(waited_s)
        self._prompt.inc(len(reply.prompt_ids))
        self._reused.inc(reply.n_reused)
        self._generated.inc(len(reply.token_ids))
        if reply.speculation is not None:
            self._drafted.inc(reply.speculation.drafted_tokens)
            self._accepted.inc(reply.speculation.accepted_tokens)
        if reply.token_ids:
            self._ttft.observe(waited_s + reply.times.ttft_us / 1e6)
        for us in reply.times.between_tokens_us:
            self._tbt.observe(us / 1e6)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        for name, state in self._models.states.items():
            self._loaded.labels(name).set(state == "loaded")
        experts = self._models.experts()
        if experts is not None:
            for name, gauge in self._gauges.items():
                gauge.set(experts["total"][name] or 0.0)
            for number, device in enumerate(experts["accelerators"]):
                for name, gauge in self._by_accelerator.items():
                    gauge.labels(str(number), device["name"]).set(({**device["total"], **device})[name] or 0.0)
        engine = self._models.engine
        if engine is not None:
            reason = engine.in_turn
            self._parallel.clear()
            self._parallel.labels("one step" if reason is None else "in turn", reason or "").set(engine.parallel)
            self._part.set(engine.part_tokens or 0)
            self._steps.set(engine.n_steps)
            self._tell_of_prefixes(engine.prefixes)
        return generate_latest(self.registry)

    def _tell_of_prefixes(self, prefixes: PrefixTree | None) -> None:
        self._prefix_budget.clear()
        if prefixes is None:
            self._prefix_budget.labels("switched off").set(0)
            return
        self._prefix_budget.labels(prefixes.reason or "").set(prefixes.max_bytes)
        counts = {
            "hits": prefixes.n_hits, "misses": prefixes.n_misses, "bytes": prefixes.n_bytes,
            "blocks": prefixes.n_blocks, "evictions": prefixes.n_evicted,
        }  # fmt: skip
        for name, value in counts.items():
            self._prefixes[name].set(value)
        disk = prefixes.disk
        self._prefix_disk_budget.clear()
        if disk is None:
            self._prefix_disk_budget.labels("switched off").set(0)
            return
        self._prefix_disk_budget.labels(disk.reason or "").set(disk.max_bytes)
        on_disk = {
            "bytes": disk.n_bytes, "files": disk.n_files, "read_tokens": prefixes.n_read_tokens,
            "read_bytes": disk.n_read_bytes, "written_bytes": disk.n_written_bytes, "evictions": disk.n_evicted,
            "damaged": disk.n_damaged, "left_out": disk.n_left_out,
        }  # fmt: skip
        for name, value in on_disk.items():
            self._prefixes_on_disk[name].set(value)
