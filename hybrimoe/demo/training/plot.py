"""A line plot as SVG text, so that a model card needs no plotting library."""

from collections.abc import Mapping, Sequence

__all__ = ["line_plot"]

WIDTH, HEIGHT, MARGIN = 720, 380, 56
"""Pixels of the picture, and of the room around the axes."""

COLOURS = ("#999999", "#1b6ca8", "#c2491d", "#2e7d32", "#6a3d9a")
MAX_POINTS = 400
"""Points drawn of a line; longer ones are thinned out."""

Line = Sequence[tuple[float, float]]


def line_plot(title: str, x_label: str, lines: Mapping[str, Line]) -> str:
    """Draws named lines of (x, y) points over common axes, with a legend; lines without points are left out."""
    drawn = {name: line[:: -(-len(line) // MAX_POINTS)] for name, line in lines.items() if line}
    points = [point for line in drawn.values() for point in line] or [(0.0, 0.0)]
    x_max = max(x for x, _ in points) or 1.0
    y_min, y_max = min(y for _, y in points), max(y for _, y in points)
    y_span = (y_max - y_min) or 1.0

    def place(x: float, y: float) -> str:
        across = MARGIN + x / x_max * (WIDTH - 2 * MARGIN)
        down = HEIGHT - MARGIN - (y - y_min) / y_span * (HEIGHT - 2 * MARGIN)
        return f"{across:.1f},{down:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 24, title, size=15),
        _text(WIDTH / 2, HEIGHT - 12, x_label),
    ]
    for step in range(5):
        y = y_min + y_span * step / 4
        ends = place(0, y), place(x_max, y)
        parts.append(f'<polyline points="{ends[0]} {ends[1]}" stroke="#dddddd" fill="none"/>')
        parts.append(_text(MARGIN - 22, float(ends[0].split(",")[1]) + 4, f"{y:.2f}"))
        parts.append(_text(float(place(x_max * step / 4, y_min).split(",")[0]), HEIGHT - 36, f"{x_max * step / 4:.3g}"))
    for number, (name, line) in enumerate(drawn.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in line)
        parts.append(f'<polyline points="{path}" stroke="{colour}" stroke-width="1.5" fill="none"/>')
        parts.append(_text(WIDTH - MARGIN - 70, 56 + 18 * number, name, colour=colour))
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, size: int = 12, colour: str = "#333333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="middle" fill="{colour}">{text}</text>'
