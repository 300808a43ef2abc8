"""Plots as PNG bytes (matplotlib, extra `bench`), and the HTML page that holds them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hybrimoe.errors import MissingExtraError

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}
img{max-width:100%}
h2{margin-top:2rem}
"""


def new_figure(width: float = 8.0, height: float = 4.0) -> tuple[Any, Any]:
    """A matplotlib figure with one axis, drawn without a display. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("bench", "matplotlib draws the plots") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def png(figure: Any) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def svg(figure: Any) -> str:
    """The figure as an SVG text; equal figures give equal texts."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "hybrimoe", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def lines(title: str, x_label: str, y_label: str, x: Sequence[float], series: Mapping[str, Sequence[float]]) -> bytes:
    """One line per series over common x values."""
    figure, axis = new_figure()
    for name, values in series.items():
        axis.plot(x, values, marker="o", markersize=3, label=name)
    axis.set(title=title, xlabel=x_label, ylabel=y_label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return png(figure)


def bars(
    title: str, y_label: str, names: Sequence[str], series: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> bytes:  # fmt: skip
    """Grouped bars: one group per name, one bar per series, with error bars of the series that ``errors`` names."""
    figure, axis = new_figure()
    width = 0.8 / max(1, len(series))
    for i, (label, values) in enumerate(series.items()):
        axis.bar([at + i * width for at in range(len(names))], values, width, label=label, yerr=errors.get(label))
    axis.set(title=title, ylabel=y_label)
    axis.set_xticks([at + 0.4 - width / 2 for at in range(len(names))], names, rotation=30, ha="right", fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=8)
    return png(figure)


def line_panels(
    title: str, x_label: str, y_label: str, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]]
) -> bytes:
    """A panel a name, in it a line a series through its points (x, y, error of y), all with one legend."""
    import matplotlib

    figure, axes = _panels(title, len(panels))
    for axis, (name, series) in zip(axes, panels.items(), strict=True):
        axis.set_prop_cycle(color=[matplotlib.colormaps["tab20"](i) for i in range(20)])
        for label, points in series.items():
            x, y, error = zip(*points, strict=True)
            axis.errorbar(x, y, yerr=error if any(error) else None, marker="o", markersize=3, label=label)
        axis.set(title=name, xlabel=x_label, ylim=(0.0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(y_label)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return png(figure)


def stacked_panels(title: str, y_label: str, panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> bytes:
    """A panel a name, in it a bar a series, stacked from its parts."""
    figure, axes = _panels(title, len(panels))
    for axis, (name, series) in zip(axes, panels.items(), strict=True):
        below = [0.0] * len(series)
        for part in next(iter(series.values())):
            values = [parts[part] for parts in series.values()]
            axis.bar(range(len(series)), values, 0.8, bottom=below, label=part)
            below = [low + value for low, value in zip(below, values, strict=True)]
        axis.set_title(name)
        axis.set_xticks(range(len(series)), list(series), rotation=90, fontsize=7)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel(y_label)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return png(figure)


def _panels(title: str, n: int) -> tuple[Any, Any]:
    """A figure with n panels beside each other."""
    figure, axis = new_figure(2.0 + 2.6 * n, 4.0)
    axis.remove()
    figure.suptitle(title)
    return figure, figure.subplots(1, n, squeeze=False)[0]


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """One self-contained HTML page: (heading, body) pairs; bodies are HTML."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>"


def image(data: bytes, text: str) -> str:
    """An embedded PNG."""
    return f"<img alt='{html.escape(text, quote=True)}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain table."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def paragraph(text: str) -> str:
    """Escaped text in a paragraph."""
    return f"<p>{html.escape(text)}</p>"
