"""The report as Markdown, JSON and one HTML page that needs nothing beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

NAMES = {"json": "gpu-check.json", "markdown": "gpu-check.md", "html": "gpu-check.html"}
MARKS = {"ok": "✔", "failed": "✘", "skipped": "–"}
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.2rem; font-size: 13px; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8885; padding: .2rem .6rem; text-align: left; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.ok { color: #187a3c; } .failed { color: #c22; } .skipped { color: #777; }
pre { white-space: pre-wrap; font-size: 12px; background: #8881; padding: .6rem; overflow-x: auto; }
"""


def write(result: dict[str, Any], folder: Path) -> None:
    """All three forms; each file is replaced as a whole, so that a reader never finds half of one."""
    texts = {
        "json": json.dumps(result, indent=1, ensure_ascii=False, default=str),
        "markdown": as_markdown(result),
        "html": as_html(result),
    }
    for form, text in texts.items():
        beside = folder / f"{NAMES[form]}.part"
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, folder / NAMES[form])


def verdict(result: dict[str, Any]) -> str:
    """One line."""
    count = {status: sum(s["status"] == status for s in result["sections"]) for status in MARKS}
    end = "" if result["complete"] else " so far"
    return f"{count['ok']} ok, {count['failed']} failed, {count['skipped']} skipped{end}, {result.get('seconds', 0)} s"


def as_markdown(result: dict[str, Any]) -> str:
    """For a file of the repository, or an issue."""
    lines = [f"# {result['title']}", "", f"{result['card']['name']}, {result['date']}: {verdict(result)}", ""]
    lines += [f"Every figure below is {result['kind']}, unless its section says otherwise.", ""]
    lines += [_markdown_table([{"section": s["title"], "result": s["status"], "why": s["why"], "s": s["seconds"],
                                "limit s": s["limit_s"]} for s in result["sections"]])]  # fmt: skip
    for section in result["sections"]:
        lines += ["", f"## {section['title']}", "", f"{section['status']}; {section['kind']}"]
        if section["status"] == "skipped":
            lines += ["", section["why"]]
        for problem in section["problems"]:
            lines += ["", f"- **{_one_line(problem)}**"]
        for title, rows in section["tables"].items():
            lines += ["", f"### {title}", "", _markdown_table(rows)]
        for remark in section["remarks"]:
            lines += ["", *_quoted(remark)]
        if section["status"] == "failed" and section["log"]:
            lines += ["", "Output:", "", *_quoted(section["log"], always=True)]
    lines += ["", "## Where", "", _markdown_table(_labels(result))]
    return "\n".join(lines)


def as_html(result: dict[str, Any]) -> str:
    """One page."""
    title = escape(f"{result['title']}: {result['card']['name']}")
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>",
        f"<style>{STYLE}</style></head><body><h1>{escape(result['title'])}</h1>",
        f"<p><b>{escape(result['card']['name'])}</b>, {escape(result['date'])}: {escape(verdict(result))}.",
        f"Every figure is <b>{escape(result['kind'])}</b>, unless its section says otherwise.</p>",
        _html_overview(result["sections"]),
    ]
    for section in result["sections"]:
        parts.append(f"<h2 id='{escape(section['name'])}'>{_html_mark(section)} {escape(section['title'])}</h2>")
        parts.append(f"<p>{escape(section['kind'])}; {section['seconds']} s of at most {section['limit_s']} s</p>")
        parts += [f"<p class='failed'>{escape(problem)}</p>" for problem in section["problems"]]
        if section["status"] == "skipped":
            parts.append(f"<p>{escape(section['why'])}</p>")
        for name, rows in section["tables"].items():
            parts += [f"<h3>{escape(name)}</h3>", _html_table(rows)]
        for remark in section["remarks"]:
            parts.append(f"<pre>{escape(remark)}</pre>" if "\n" in remark else f"<p>{escape(remark)}</p>")
        if section["log"]:
            parts.append(f"<details><summary>output</summary><pre>{escape(section['log'])}</pre></details>")
    parts += ["<h2>Where</h2>", _html_table(_labels(result)), "</body></html>"]
    return "\n".join(parts)


def _labels(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"of": part, "what": name, "is": value}
        for part in ("card", "machine", "versions")
        for name, value in result[part].items()
    ]


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> str:
    return (
        "" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = _columns(rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (_one_line(_cell(row.get(name))).replace("|", "\\|") for name in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _quoted(text: str, *, always: bool = False) -> Iterator[str]:
    """As it is on one line; as a block of code on several."""
    if "\n" not in text and not always:
        yield text
        return
    yield "````text"
    yield from text.splitlines()
    yield "````"


def _html_mark(section: dict[str, Any]) -> str:
    status = section["status"]
    return f"<span class='{status}'>{MARKS[status]} {status}</span>"


def _html_overview(sections: Sequence[dict[str, Any]]) -> str:
    rows = [
        f"<tr><td>{_html_mark(s)}</td><td><a href='#{escape(s['name'])}'>{escape(s['title'])}</a></td>"
        f"<td class='number'>{s['seconds']} s</td><td>{escape(_one_line(s['why']))}</td></tr>"
        for s in sections
    ]
    return "<table>" + "".join(rows) + "</table>"


def _html_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = _columns(rows)
    numbers = {name for name in columns if all(isinstance(row.get(name), int | float | None) for row in rows)}

    def cell(tag: str, name: str, text: str) -> str:
        return f"<{tag}{' class=number' if name in numbers else ''}>{escape(text)}</{tag}>"

    head = "".join(cell("th", name, name.replace("_", " ")) for name in columns)
    body = "".join(
        "<tr>" + "".join(cell("td", name, _cell(row.get(name))) for name in columns) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
