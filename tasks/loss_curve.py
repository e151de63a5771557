"""Training and validation loss as an SVG picture, drawn by hand: a plotting library would take a second to import."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Point = tuple[float, float]

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 30, 40
"""Pixels between the picture's edge and the axes."""
MAX_POINTS = 400
"""A longer curve is thinned: more points than pixels show nothing."""
TRAINING, VALIDATION = "#1f77b4", "#d62728"


def loss_points(records: Iterable[Mapping[str, Any]], field: str) -> list[Point]:
    """(iteration, value) of all records that have a finite value in the field."""
    found = [(record["iteration"], record.get(field)) for record in records]
    return [(x, y) for x, y in found if isinstance(y, int | float) and math.isfinite(y)]


def loss_curve(training: Sequence[Point], validation: Sequence[Point]) -> str | None:
    """An SVG document; None if there is nothing to draw.

    Args:
        training: (iteration, loss) of training steps, in order.
        validation: (iteration, loss) of validations, in order.
    """
    if not training and not validation:
        return None
    xs = [x for x, _ in (*training, *validation)]
    ys = [y for _, y in (*training, *validation)]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 8), ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> str:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for value in y_ticks:
        y = place((x_low, value)).partition(",")[2]
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        if x_low <= value <= x_high:
            x = place((value, y_low)).partition(",")[0]
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    if training:
        line = " ".join(map(place, thinned(training)))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{TRAINING}" stroke-width="1.5"/>')
    if validation:
        line = " ".join(map(place, thinned(validation)))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{VALIDATION}" stroke-dasharray="4 3"/>')
        for point in thinned(validation):
            x, _, y = place(point).partition(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{VALIDATION}"/>')
    for index, (name, colour, drawn) in enumerate(
        (("training loss", TRAINING, training), ("validation loss", VALIDATION, validation))
    ):
        if drawn:
            parts.append(f'<text x="{LEFT + 130 * index}" y="18" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">iteration</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `MAX_POINTS` of them, the last one always among them; each is one that was measured."""
    stride = math.ceil(len(points) / MAX_POINTS)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float, number: int) -> list[float]:
    """Round numbers from one at or below `low` to one at or above `high`, about `number` of them, at least two."""
    span = high - low or abs(low) or 1.0
    step = 10 ** math.floor(math.log10(span / number))
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor >= span / number * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    digits = max(12, 3 - math.floor(math.log10(step)))  # or ticks of tiny values would all be zero
    return [round(index * step, digits) for index in range(first, max(last, first + 1) + 1)]


def data_uri(svg: str) -> str:
    """The picture as a link target, for pages that can't have files beside them."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
