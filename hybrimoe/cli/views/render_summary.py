"""What a reply cost and what each lane did: as data for --json, as a few lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.generation import Reply

MIB = 2**20


def reply_as_dict(reply: Reply, experts: Mapping[str, Any] | None) -> dict[str, Any]:
    """One reply as plain data. Times are measured on this machine; `experts` are the session's counters or None."""
    times = reply.times
    n_prefilled = reply.n_kept - reply.n_reused
    return {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "seed": reply.seed,
        "token_ids": reply.token_ids,
        "prompt_tokens": len(reply.prompt_ids),
        "reused_tokens": reply.n_reused,
        "reused_from_disk": reply.n_read,
        "new_tokens": len(reply.token_ids),
        "ttft_us": times.ttft_us,
        "prefill": {
            "tokens": n_prefilled,
            "us": times.prefill_us,
            "tokens_per_s": _rate(n_prefilled, times.prefill_us),
        },
        "decode": _decode(times.between_tokens_us),
        "experts": experts,
        **({"context_shifts": reply.n_shifts} if reply.n_shifts else {}),
        **({} if reply.speculation is None else {"speculation": reply.speculation.as_dict()}),
        **({} if reply.profile is None else {"profile": reply.profile.as_dict()}),
    }


def _decode(between_tokens_us: Sequence[float]) -> dict[str, Any]:
    total = sum(between_tokens_us)
    ordered = sorted(between_tokens_us)
    return {
        "tokens": len(ordered),
        "us": total,
        "tokens_per_s": _rate(len(ordered), total),
        "median_us": median(ordered) if ordered else None,
        "p95_us": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else None,
    }


def _rate(count: int, us: float) -> float | None:
    return count / us * 1e6 if count and us > 0 else None


def summary(result: Mapping[str, Any]) -> Group:
    """The lines that follow a reply: speed, cache, lanes."""
    parts: list[Any] = [_speed(result)]
    if result.get("experts"):
        experts = result["experts"]
        parts += [_cache(experts), *_tier(experts), *_lossy(experts), _lanes(experts)]
    return Group(*parts)


def _speed(result: Mapping[str, Any]) -> Text:
    prefill, decode = result["prefill"], result["decode"]
    reused = f" (+ {_reused(result)})" if result["reused_tokens"] else ""
    lines = [
        f"prefill  {prefill['tokens']} tokens{reused}, {rate(prefill['tokens_per_s'])}, "
        f"first token after {ms(result['ttft_us'])}",
        f"decode   {decode['tokens']} tokens, {rate(decode['tokens_per_s'])}",
    ]
    if decode["median_us"] is not None:
        lines[1] += f", {ms(decode['median_us'])} a token (median; p95 {ms(decode['p95_us'])})"
    if "speculation" in result:
        lines.append(f"drafts   {speculation(result['speculation'])}")
    if "context_shifts" in result:
        lines.append(f"context  was full {_times(result['context_shifts'])}: the oldest tokens were left out")
    lines.append(f"end      {END_WORDS[result['finish_reason']]}; seed {result['seed']}")
    return Text("\n".join(lines))


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _reused(result: Mapping[str, Any], what: str = "") -> str:
    """Prompt tokens that were not computed."""
    from_disk = f", {result['reused_from_disk']} of them read from disk" if result["reused_from_disk"] else ""
    return f"{result['reused_tokens']} {what}from the cache{from_disk}"


def speculation(stats: Mapping[str, Any]) -> str:
    """What drafts did for a reply; stats: `SpeculationStats.as_dict`."""
    told = f"{stats['accepted_tokens']} of {stats['drafted_tokens']} drafted tokens were right: {stats['steps']} steps"
    saved = f" in place of {stats['steps'] + stats['steps_saved']}"
    over = f"; {stats['passed_over']} steps without their draft, because drafts were losing"
    return told + (saved if stats["steps_saved"] else "") + (over if stats["passed_over"] else "")


END_WORDS = {
    "complete": "the structure of the reply has its end",
    "eos": "the model ended the text",
    "stop": "a stop text was reached",
    "length": "--max-new-tokens was reached",
    "context": "the model's context is full",
    "interrupted": "interrupted",
    None: "unfinished",
}


def _cache(experts: Mapping[str, Any]) -> Text:
    total = experts["total"]
    rates = ", ".join(
        f"{phase} {percent(experts[phase]['hit_rate'])}" for phase in ("prefill", "decode") if experts[phase]["calls"]
    )
    mib = total["transfer_bytes"] / MIB
    return Text(
        f"experts  {experts['n_slots']} of {experts['n_experts']} have a slot; hit rate {rates or 'none yet'}\n"
        f"         {total['transfers']} demand transfers, {total['prefetches']} prefetches "
        f"(precision {percent(total['prefetch_precision'])}), {mib:.1f} MiB moved\n"
        f"policy   {experts['policy']}; planning and dispatch {ms(total['overhead_us'])} "
        f"of {ms(total['wall_us'])} in the expert layers"
    )


def _lossy(experts: Mapping[str, Any]) -> list[Text]:
    """What a lossy policy did to the routing; nothing where there is none."""
    if not experts.get("lossy"):
        return []
    total = experts["total"]
    told = [f"{percent(total[key] / total['routed'])} {words}" for key, words in LOSSY_WORDS.items() if total[key]]
    shares = ", ".join(told) or "none changed"
    slots = f"; {experts['n_low_slots']} low-precision slots" if experts["n_low_slots"] else ""
    return [Text(f"lossy    {experts['lossy']}: of the routed experts {shares}{slots}")]


LOSSY_WORDS = {"skipped": "skipped", "substituted": "substituted", "lowered": "in low precision", "deferred": "late"}


def lane_rows(experts: Mapping[str, Any]) -> list[tuple[str, float, int, str]]:
    """(lane, busy us, items, what the items are) of each lane that exists."""
    total = experts["total"]
    rows = [("CPU", total["cpu_us"], total["cpu_experts"], "experts")]
    units = experts["accelerators"] if experts["n_slots"] else []
    for number, unit in enumerate(units):
        of, name = unit["total"], f" {number}" if len(units) > 1 else ""
        rows.append((f"accelerator{name} ({_words(unit)})", of["accel_us"], of["accel_experts"], "experts"))
        rows.append((f"link{name}", of["link_us"], of["transfers"] + of["prefetches"], "transfers"))
    if experts.get("tier"):
        rows.append(("disk", experts["tier"]["busy_us"], total["disk_reads"] + total["disk_ahead"], "reads"))
    return rows


def _tier(experts: Mapping[str, Any]) -> list[Text]:
    """What host memory holds of the experts; nothing where it holds them all."""
    tier = experts.get("tier")
    if not tier:
        return []
    total, room = experts["total"], gib(tier["n_slots"] * tier["slot_bytes"])
    how = "past the page cache" if tier["direct"] else "through the page cache"
    return [
        Text(
            f"memory   {tier['n_slots']} of {tier['n_records']} experts fit ({room}, memory.host);"
            f" {total['disk_reads']} were read when they were needed, {total['disk_ahead']} before\n"
            f"         {gib(total['disk_bytes'])} read {how} at {tier['gbps']:.2f} GB/s; waited"
            f" {ms(total['disk_wait_us'])} for them"
        )
    ]


def gib(n_bytes: int) -> str:
    """A size in GiB."""
    return f"{n_bytes / 2**30:.2f} GiB"


def _lanes(experts: Mapping[str, Any]) -> Any:
    wall_us = experts["total"]["wall_us"]
    rows = [
        (name, ms(busy), percent(busy / wall_us if wall_us else None), f"{count} {what}")
        for name, busy, count, what in lane_rows(experts)
    ]
    return render.table(None, ("lane", "busy", "of expert time", "did"), rows)


def _words(unit: Mapping[str, Any]) -> str:
    """The accelerator for people; an emulated one always says so."""
    return "emulated" if unit["kind"] == "emulated" else str(unit["name"])


def provenance(experts: Mapping[str, Any] | None) -> str:
    """`measured`, or `emulated` where a part of the work ran on the emulated accelerator."""
    from hybrimoe.runtime.layer_call.stats import ran_emulated

    return "emulated accelerator" if experts is not None and ran_emulated(experts) else "measured"


def one_line(result: Mapping[str, Any]) -> str:
    """The short form that follows each reply of a chat in a pipe."""
    decode = result["decode"]
    words = [
        f"{result['new_tokens']} tokens",
        rate(decode["tokens_per_s"]),
        f"first after {ms(result['ttft_us'])}",
        *([_reused(result, "prompt tokens ")] if result["reused_tokens"] else []),
    ]
    return ", ".join([*words, *_how_it_ran(result)])


def status(result: Mapping[str, Any], context_tokens: int | None) -> str:
    """What a terminal shows after each reply of a chat: speed, hit rate, how full the context is.

    context_tokens: the longest prompt and reply together; None where nothing limits them.
    """
    used = f"context {result['prompt_tokens'] + result['new_tokens']}"
    full = used if context_tokens is None else f"{used} of {context_tokens}"
    return ", ".join([rate(result["decode"]["tokens_per_s"]), *_how_it_ran(result), full])


def _how_it_ran(result: Mapping[str, Any]) -> list[str]:
    """Drafts, slots, lossy policy, and an end that came early, where there are such."""
    experts, words = result.get("experts"), []
    if "speculation" in result:
        words.append(f"{result['speculation']['steps_saved']} steps saved by drafts")
    if experts and experts["n_slots"]:
        words.append(f"hit rate {percent(experts['total']['hit_rate'])} ({provenance(experts)})")
    if experts and experts.get("lossy"):
        words.append(f"lossy: {experts['lossy']}")
    if "context_shifts" in result:
        words.append("oldest tokens left out")
    if result["finish_reason"] in ("interrupted", "context"):
        words.append(END_WORDS[result["finish_reason"]])
    return words


def rate(tokens_per_s: float | None) -> str:
    """A speed for people."""
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def ms(us: float | None) -> str:
    """A time for people: ms, or s from ten seconds on."""
    if us is None:
        return "-"
    return f"{us / 1e6:.1f} s" if us >= 1e7 else f"{us / 1e3:.1f} ms"


def percent(share: float | None) -> str:
    """A share for people."""
    return "-" if share is None else f"{share:.1%}"
