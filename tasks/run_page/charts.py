"""Pictures of the page as inline SVG. Colours are the page's own, by CSS class, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from tasks.loss_curve import Point, thinned, ticks

WIDTH, HEIGHT = 480, 260
"""Of the drawing; the page scales it to its column, so that its letters can still be read on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 16, 40
LEAST = 1e-12
"""The least error that a logarithmic scale goes down to."""


def curves(title: str, lines: Mapping[str, Sequence[Point]], x_label: str = "iteration") -> Markup | None:
    """Lines over a common x axis; None if there is nothing to draw.

    Args:
        title: What the picture shows, also for those who can't see it.
        lines: CSS class of each line, and its (x, y).
        x_label: What x counts.
    """
    drawn = {name: points for name, points in lines.items() if points}
    if not drawn:
        return None
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    y_ticks = ticks(min(ys), max(ys), 5)
    place = _Place(min(xs), max(max(xs), min(xs) + 1), y_ticks[0], y_ticks[-1])
    parts = [place.grid(value, f"{value:g}") for value in y_ticks]
    parts += [place.x_tick(value, f"{value:g}") for value in ticks(min(xs), max(xs), 6)]
    for name, points in drawn.items():
        line = " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in thinned(points))
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(name, line))
        if len(points) == 1:  # a line of one point can't be seen
            parts.append(place.dot(points[0], name))
    first, last = (", ".join(f"{name} {points[end][1]:.4g}" for name, points in drawn.items()) for end in (0, -1))
    return _svg(title, f"From {first} to {last}.", x_label, parts)


def errors_of_parts(title: str, errors: Sequence[tuple[str, float]], gate: float) -> Markup | None:
    """Relative error of each part of a model in the order of computation, on a logarithmic scale, with the gate.

    What is not finite is drawn at the upper edge, as failed; no error at all on the lowest line, which then says 0.
    """
    if not errors:
        return None
    finite = [error for _, error in errors if math.isfinite(error) and error > 0]
    low = math.floor(math.log10(max(LEAST, min([gate, *finite])))) - 1
    high = math.ceil(math.log10(max([gate, *finite]))) + 1
    place = _Place(-0.5, len(errors) - 0.5, low, high)
    step = max(1, (high - low) // 6)
    exact = any(error == 0 for _, error in errors)  # no power of ten is nothing: it has the lowest line for itself
    parts = [place.grid(power, "0" if exact and power == low else f"1e{power}") for power in range(low, high + 1, step)]
    y = f"{place.y(math.log10(gate)):.1f}"
    parts.append(Markup('<line class="gate" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y))
    parts.append(
        Markup('<text class="gate" x="{}" y="{}" dy="-5" text-anchor="end">gate {:g}</text>').format(
            WIDTH - RIGHT, y, gate
        )
    )
    for index, (part, error) in enumerate(errors):
        power = high if not math.isfinite(error) else low if error <= 0 else max(low, math.log10(error))
        parts.append(place.dot((index, power), "passed" if error <= gate else "failed", f"{part}: {error:.3g}"))
    worst = next((one for one in errors if not math.isfinite(one[1])), max(errors, key=lambda one: one[1]))
    summary = f"{len(errors)} parts, the worst is {worst[0]} with {worst[1]:.3g}; the gate is {gate:g}."
    return _svg(title, summary, f"{errors[0][0]} … {errors[-1][0]}", parts)


def bars(title: str, counts: Sequence[tuple[str, float]], x_label: str) -> Markup | None:
    """A bar a count, such as a histogram of lengths; None if there are none."""
    if not counts:
        return None
    y_ticks = ticks(0, max(max(count for _, count in counts), 1), 5)
    place = _Place(0, len(counts), y_ticks[0], y_ticks[-1])
    parts = [place.grid(value, f"{value:g}") for value in y_ticks]
    for index, (label, count) in enumerate(counts):
        left, right = place.x(index), place.x(index + 1)
        parts.append(
            Markup(
                '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
            ).format(
                left + 1, place.y(count), max(right - left - 2, 0.5), place.y(y_ticks[0]) - place.y(count),
                f"{label}: {count:g}",
            )
        )  # fmt: skip
        if index % math.ceil(len(counts) / 6) == 0:
            parts.append(place.x_tick(index + 0.5, label))
    return _svg(title, "; ".join(f"{label}: {count:g}" for label, count in counts[:50]), x_label, parts)


class _Place:
    """Where values are drawn."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self._x, self._y = (x_low, x_high), (y_low, y_high)

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, value: float, label: str) -> Markup:
        y = f"{self.y(value):.1f}"
        return Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text x="{}" y="{}" dy="4" text-anchor="end">{}</text>'
        ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 7, y, label)

    def x_tick(self, value: float, label: str) -> Markup:
        low, high = self._x
        if not low <= value <= high:
            return Markup()
        return Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            self.x(value), HEIGHT - BOTTOM + 17, label
        )

    def dot(self, point: Point, name: str, told: str = "") -> Markup:
        title = Markup("<title>{}</title>").format(told) if told else Markup()
        return Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5">{}</circle>').format(
            name, self.x(point[0]), self.y(point[1]), title
        )


def _svg(title: str, summary: str, x_label: str, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" xmlns="http://www.w3.org/2000/svg">'
        "<title>{}</title><desc>{}</desc>{}"
        '<text x="{}" y="{}" text-anchor="end">{}</text></svg>'
    ).format(
        WIDTH, HEIGHT, title, summary, Markup("\n").join(parts), WIDTH - RIGHT, HEIGHT - 5, escape(x_label)
    )  # fmt: skip
