"""From rows to the tables of the ablation: Table III, average speed-ups, hit rates, way to the oracle and the bound.

Of several seeds each figure is the mean, and a row's ``sd`` has the standard deviations over the seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, median, stdev
from typing import Any

from hybrimoe.bench.ablation.cases import PAPER_HITS, PAPER_SPEEDUP, TABLE_3

MEASURED = "hybrimoe_released"
"""The policy that the paper's figures were measured with: that of its code."""

Row = dict[str, Any]
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Plain data of every experiment that has rows; ``seeds``: those that the figures are means over."""
    seeds = list(dict.fromkeys(row.get("seed", 0) for row in rows))
    drawn = [_of_one_seed([row for row in rows if row.get("seed", 0) == seed]) for seed in seeds]
    return {"kind": "simulated", "seeds": seeds, **_over_seeds(drawn)}


def _of_one_seed(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found = {
        "table3": _table_3([row for row in rows if row["experiment"] == "table3"]),
        "sensitivity": _sensitivity([row for row in rows if row["experiment"] == "sensitivity"]),
        "speedups": _speedups([row for row in rows if row["experiment"] == "paper"]),
        "hits": _hits([row for row in rows if row["experiment"] == "hits"]),
        "policies": _policies([row for row in rows if row["experiment"] == "policies"]),
        "lossy": _lossy([row for row in rows if row["experiment"] == "lossy"]),
    }
    return {name: table for name, table in found.items() if table}


def _over_seeds(drawn: Sequence[dict[str, list[Row]]]) -> dict[str, list[Row]]:
    """The same experiments and rows of each seed, as means."""
    if len(drawn) < 2:
        return dict(drawn[0]) if drawn else {}
    return {
        name: [_mean_row(rows) for rows in zip(*(tables[name] for tables in drawn), strict=True)] for name in drawn[0]
    }


def _mean_row(rows: Sequence[Row]) -> Row:
    """Floats become means, with their standard deviations in ``sd``; what else a row says is alike in all."""
    mean, sd = dict(rows[0]), {}
    for key in mean:
        values = [row[key] for row in rows]
        if isinstance(values[0], dict):
            merged = _mean_row(values)
            sd[key] = merged.pop("sd")
            mean[key] = merged
        elif any(isinstance(value, float) for value in values):
            known = [value for value in values if value is not None]
            mean[key], sd[key] = fmean(known), stdev(known) if len(known) > 1 else 0.0
    return {**mean, "sd": sd}


def _table_3(rows: Sequence[Row]) -> list[Row]:
    seconds = {(row["label"], row["phase"]): row["latency_ms"] / 1e3 for row in rows}
    result = []
    for label, (policy, prefill, decode) in TABLE_3.items():
        for phase, paper in (("prefill", prefill), ("decode", decode)):
            if (label, phase) in seconds:
                simulated = seconds[label, phase]
                base = seconds["baseline", phase]
                off = None if paper is None else simulated / paper - 1.0
                result.append({"step": label, "policy": policy, "phase": phase, "simulated_s": simulated,
                               "paper_s": paper, "off": off, "speedup": base / simulated})  # fmt: skip
    return result


def _sensitivity(rows: Sequence[Row]) -> list[Row]:
    """Per assumption: how far each of the paper's figures is off, and the largest of them."""
    result = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        off = {}
        for row in (row for row in rows if row["variant"] == variant):
            paper = dict(zip(("prefill", "decode"), TABLE_3[row["label"]][1:], strict=True))[row["phase"]]
            if paper is not None:
                off[f"{row['label']}, {row['phase']}"] = row["latency_ms"] / 1e3 / paper - 1.0
        result.append({"variant": variant, "off": off, "largest": max(off.values(), key=abs)})
    return result


def _speedups(rows: Sequence[Row]) -> list[Row]:
    """Mean and range over models, shares and lengths of the speed-up over static."""
    base = {_setting(row): row["latency_ms"] for row in rows if row["policy"] == "static"}
    result = []
    for phase, paper in PAPER_SPEEDUP.items():
        for policy in sorted({row["policy"] for row in rows} - {"static"}):
            gains = [base[_setting(r)] / r["latency_ms"] for r in rows if r["phase"] == phase and r["policy"] == policy]
            if gains:
                result.append({"phase": phase, "policy": policy, "mean": fmean(gains), "least": min(gains),
                               "most": max(gains), "paper": paper if policy == MEASURED else None})  # fmt: skip
    return result


def _setting(row: Row) -> tuple[Any, ...]:
    return (row["hardware"], row["shape"], row["trace"], row["cache_ratio"], row["phase"], row["n_prefill"])


def _hits(rows: Sequence[Row]) -> list[Row]:
    found = {(row["shape"], row["label"]): row["hit_rate"] for row in rows}
    return [
        {"shape": shape, "cache": cache, "simulated": found[shape, cache], "paper": paper}
        for shape, pair in PAPER_HITS.items()
        for cache, paper in zip(("lru", "mrs"), pair, strict=True)
        if (shape, cache) in found
    ]


def _policies(rows: Sequence[Row]) -> list[Row]:
    """Per policy over all traces, profiles and shares: speed-up over static, and share of the way to the oracle."""
    by_setting: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        by_setting.setdefault(_setting(row), {})[row["policy"]] = row
    whole = [group for group in by_setting.values() if {"static", "oracle"} <= set(group)]
    result = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        groups = [group for group in whole if policy in group]
        gains = [group["static"]["latency_ms"] / group[policy]["latency_ms"] for group in groups]
        shares = [share for group in groups if (share := oracle_share(group, policy)) is not None]
        bounded = [share for group in groups if (share := bound_share(group, policy)) is not None]
        precise = [group[policy]["prefetch_precision"] for group in groups if group[policy]["prefetches"]]
        if gains:
            result.append({"policy": policy, "settings": len(gains), "speedup": fmean(gains), "median": median(gains),
                           "hit_rate": fmean(group[policy]["hit_rate"] for group in groups),
                           "oracle_share": fmean(shares) if shares else None,
                           "bound_share": fmean(bounded) if bounded else None,
                           "prefetch_precision": fmean(precise) if precise else None})  # fmt: skip
    return result


def _lossy(rows: Sequence[Row]) -> list[Row]:
    """Per lossy policy and policy, over the profiles: speed-up over the lossless run of the same policy and dtype."""

    def group(row: Row) -> tuple[str, ...]:
        return row["policy"], row["expert_dtype"], row["label"]

    base = {(row["hardware"], *group(row)[:2]): row for row in rows if row["label"] == "lossless"}
    result = []
    for policy, dtype, label in dict.fromkeys(group(row) for row in rows):
        own = [row for row in rows if group(row) == (policy, dtype, label)]
        gains = [base[row["hardware"], policy, dtype]["latency_ms"] / row["latency_ms"] for row in own]
        result.append({"policy": policy, "expert_dtype": dtype, "lossy": label, "speedup": fmean(gains),
                       "least": min(gains), "most": max(gains), "hit_rate": fmean(row["hit_rate"] for row in own),
                       "mib_per_token": fmean(row["link_bytes"] / row["tokens"] for row in own) / 2**20,
                       "changed": fmean(row["changed"] for row in own)})  # fmt: skip
    return result


def oracle_share(group: dict[str, Row], policy: str) -> float | None:
    """(static - policy) / (static - oracle) in time; None where the oracle gains nothing."""
    static, oracle = group["static"]["latency_ms"], group["oracle"]["latency_ms"]
    return None if static - oracle <= 1e-9 else (static - group[policy]["latency_ms"]) / (static - oracle)


def bound_share(group: dict[str, Row], policy: str) -> float | None:
    """(static - policy) / (static - what no policy can beat) in time; None where nothing can be gained."""
    static, bound = group["static"]["latency_ms"], group["static"]["bound_ms"]
    return None if static - bound <= 1e-9 else float((static - group[policy]["latency_ms"]) / (static - bound))


Point = tuple[float, float, float]
"""x, y, standard deviation of y (0 where there is one seed)."""


def latency_by_share(rows: Sequence[Row]) -> dict[str, dict[str, list[Point]]]:
    """machine -> policy -> ms a token at each share of the experts that is cached, mean over the seeds."""
    found: dict[str, dict[str, list[Point]]] = {}
    for (machine, policy, share), own in sorted(_grouped(rows, "hardware", "policy", "cache_ratio").items()):
        ms = [row["latency_ms"] for row in own]
        point = (share, fmean(ms), stdev(ms) if len(ms) > 1 else 0.0)
        found.setdefault(machine, {}).setdefault(policy, []).append(point)
    return found


LANES = {"CPU": "cpu_busy", "accelerator": "accel_busy", "link": "link_busy"}


def busy_lanes(rows: Sequence[Row], share: float) -> dict[str, dict[str, dict[str, float]]]:
    """machine -> policy -> lane -> busy ms a token at a cached share, mean over the seeds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (machine, policy, at), own in _grouped(rows, "hardware", "policy", "cache_ratio").items():
        if at == share:
            busy = {lane: fmean(row[key] * row["latency_ms"] for row in own) for lane, key in LANES.items()}
            found.setdefault(machine, {})[policy] = busy
    return found


def _grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def tables(summary: dict[str, Any]) -> list[Table]:
    """(title, columns, rows) for the terminal and the HTML page."""
    makers = {"table3": _table_3_table, "sensitivity": _sensitivity_table,
              "speedups": _speedup_table, "hits": _hit_table, "policies": _policy_table,
              "lossy": _lossy_table}  # fmt: skip
    return [make(summary[name]) for name, make in makers.items() if name in summary]


def _table_3_table(rows: Iterable[Row]) -> Table:
    columns = ("step", "policy", "phase", "simulated", "paper", "off", "gain")
    cells = [
        (r["step"], r["policy"], r["phase"], _told(r, "simulated_s", "{:.3f}", " s"), _seconds(r["paper_s"]),
         _signed(r["off"]), _told(r, "speedup", "{:.2f}", "x"))
        for r in rows
    ]  # fmt: skip
    return "Table III, Qwen2-57B-A14B, 25 % cached", columns, cells


def _sensitivity_table(rows: Sequence[Row]) -> Table:
    figures = list(rows[0]["off"])
    cells = [(r["variant"], *(_signed(r["off"][figure]) for figure in figures), _signed(r["largest"])) for r in rows]
    return "Table III with one assumption changed: off the paper's figures", ("", *figures, "largest"), cells


def _speedup_table(rows: Iterable[Row]) -> Table:
    cells = [
        (f"{r['policy']}, {r['phase']}", _told(r, "mean", "{:.2f}", "x"), f"{r['least']:.2f} - {r['most']:.2f}",
         "-" if r["paper"] is None else f"{r['paper']:.2f}x")
        for r in rows
    ]  # fmt: skip
    return "Speed-up over static, paper's machine and models", ("", "mean", "range", "paper"), cells


def _hit_table(rows: Iterable[Row]) -> Table:
    cells = [(f"{r['shape']}, {r['cache']}", _told(r, "simulated", "{:.1%}"), f"{r['paper']:.1%}") for r in rows]
    return "Hit rates at 25 %", ("", "simulated", "paper"), cells


def _policy_table(rows: Iterable[Row]) -> Table:
    columns = ("policy", "speed-up", "median", "hits", "of the way to the oracle", "to the bound", "prefetch right")
    cells = [(r["policy"], _told(r, "speedup", "{:.2f}", "x"), _told(r, "median", "{:.2f}", "x"),
              _told(r, "hit_rate", "{:.1%}"), _told(r, "oracle_share", "{:.0%}"),
              _told(r, "bound_share", "{:.0%}"), _told(r, "prefetch_precision", "{:.0%}")) for r in rows]  # fmt: skip
    return "Every policy, mean over traces, profiles and cache shares (decode)", columns, cells


def _lossy_table(rows: Iterable[Row]) -> Table:
    columns = ("policy", "lossy", "experts", "speed-up", "range", "hits", "MiB a token", "routed experts changed")
    cells = [(r["policy"], r["lossy"], r["expert_dtype"], _told(r, "speedup", "{:.2f}", "x"),
              f"{r['least']:.2f} - {r['most']:.2f}", f"{r['hit_rate']:.1%}", f"{r['mib_per_token']:.0f}",
              f"{r['changed']:.0%}") for r in rows]  # fmt: skip
    return "Lossy policies over the lossless run, mean over profiles (quality: bench quality --lossy)", columns, cells


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.0%}"


def _told(row: Row, key: str, form: str, unit: str = "") -> str:
    """A figure, with its standard deviation where there is one."""
    if row[key] is None:
        return "-"
    spread = row.get("sd", {}).get(key)
    return form.format(row[key]) + ("" if spread is None else f" ± {form.format(spread)}") + unit


def markdown(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table for a page."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(title: str, columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table for a paper (package booktabs); the first column is text, the others are right-aligned."""
    rows = [" & ".join(map(_escaped, line)) + r" \\" for line in (columns, *cells)]
    return "\n".join(
        [r"\begin{table}", r"  \centering", rf"  \caption{{{_escaped(title)} (simulated)}}",
         rf"  \begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"    \toprule", f"    {rows[0]}", r"    \midrule",
         *(f"    {row}" for row in rows[1:]), r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""]
    )  # fmt: skip


_LATEX = str.maketrans(
    {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "±": r"$\pm$",
     "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)  # fmt: skip


def _escaped(text: str) -> str:
    return text.translate(_LATEX)
