"""A line chart as a small SVG: points, the lines between them, axes with round numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 60
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#9a6700")
Points = Sequence[tuple[float, float]]


def line_chart(
    path: Path, title: str, x_label: str, y_label: str, series: Mapping[str, Points]
) -> None:
    """Write ``series`` (name -> points, at least one point in all) into an SVG file.

    Both axes begin at zero, so that a cost that grows linearly looks it.
    """
    points = [point for line in series.values() for point in line]
    x_ticks, y_ticks = (_ticks(max(point[axis] for point in points)) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / x_ticks[-1]
        return round(across, 1), round(
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / y_ticks[-1], 1
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 22, title, size=15),
        _text(WIDTH / 2, HEIGHT - 12, x_label),
        _text(16, HEIGHT / 2, y_label, turn=True),
    ]
    for tick in x_ticks:
        x, y = place(tick, 0)
        parts.append(_line([(x, y), (x, TOP)], "#ddd"))
        parts.append(_text(x, y + 18, f"{tick:,g}"))
    for tick in y_ticks:
        x, y = place(0, tick)
        parts.append(_line([(x, y), (WIDTH - RIGHT, y)], "#ddd"))
        parts.append(_text(x - 8, y + 4, f"{tick:,g}", anchor="end"))
    for index, (name, line) in enumerate(series.items()):
        color = COLORS[index % len(COLORS)]
        placed = [place(*point) for point in line]
        parts.append(_line(placed, color, width=2))
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in placed]
        parts.append(_text(LEFT + 10, TOP + 16 * (index + 1), name, anchor="start", color=color))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to at least ``largest``, four to ten of them."""
    if largest <= 0:
        return [0.0, 1.0]
    step = 10.0 ** math.floor(math.log10(largest))
    for factor in (1.0, 0.5, 0.2):
        if largest / (step * factor) >= 4:
            step *= factor
            break
    else:
        step *= 0.2
    return [step * number for number in range(math.ceil(largest / step - 1e-9) + 1)]


def _line(points: Points, color: str, width: float = 1) -> str:
    spelt = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{spelt}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    anchor: str = "middle",
    color: str = "#333",
    turn: bool = False,
) -> str:
    turned = f' transform="rotate(-90 {x} {y})"' if turn else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{color}"{turned}>'
        f"{escape(text)}</text>"
    )
