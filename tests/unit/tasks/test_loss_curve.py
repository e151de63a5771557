"""The picture of the loss: well-formed, complete, and inside its frame."""

import base64
import math
from xml.etree import ElementTree

import pytest

from tasks.loss_curve import HEIGHT, MAX_POINTS, WIDTH, data_uri, loss_curve, loss_points, thinned, ticks

SVG = "{http://www.w3.org/2000/svg}"


def test_points_are_finite_numbers_only() -> None:
    records = [
        {"iteration": 1, "loss": 2.0},
        {"iteration": 2, "loss": math.nan},
        {"iteration": 3, "loss": None},
        {"iteration": 4, "loss": math.inf},
        {"iteration": 4, "validation_loss": 1.5},
        {"iteration": 5, "loss": 1},
    ]
    assert loss_points(records, "loss") == [(1, 2.0), (5, 1)]
    assert loss_points(records, "validation_loss") == [(4, 1.5)]


def test_without_points_there_is_no_picture() -> None:
    assert loss_curve([], []) is None


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        ([(1, 2.0)], []),
        ([], [(10, 1.0)]),
        ([(1, 2.0), (2, 2.0)], [(2, 2.0)]),
        ([(number, 5 / number) for number in range(1, 1001)], [(number, 3.0) for number in range(100, 1001, 100)]),
        ([(1, 0.0), (2, 0.0)], []),
        ([(1, 1e-9), (10**6, 1e9)], []),
        ([(1, -2.0), (2, 3.0)], []),
    ],
)
def test_everything_drawn_is_inside_the_frame(
    training: list[tuple[float, float]], validation: list[tuple[float, float]]
) -> None:
    svg = loss_curve(training, validation)
    assert svg is not None
    root = ElementTree.fromstring(svg)
    lines = root.findall(f"{SVG}polyline")
    assert len(lines) == bool(training) + bool(validation)
    assert len(root.findall(f"{SVG}circle")) == min(len(validation), MAX_POINTS)
    for line in lines:
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT
    for text in root.findall(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) <= WIDTH and 0 <= float(text.attrib["y"]) <= HEIGHT


def test_a_lower_loss_is_drawn_lower_and_a_later_one_to_the_right() -> None:
    svg = loss_curve([(1, 3.0), (5, 2.0), (9, 1.0)], [])
    assert svg is not None
    line = ElementTree.fromstring(svg).find(f"{SVG}polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys)
    assert points[1] == pytest.approx(((xs[0] + xs[2]) / 2, (ys[0] + ys[2]) / 2), abs=0.1)


def test_long_curves_are_thinned_to_points_that_were_measured() -> None:
    points = [(number, math.sin(number)) for number in range(10_001)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS + 1 and set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert thinned(points[:5]) == points[:5]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 200), (2.5, 2.5), (0.001, 0.0013), (0, 0), (-3, 1e6), (-1, -1)])
def test_ticks_are_round_and_cover_the_values(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    assert found == sorted(set(found))
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125"


def test_a_data_uri_holds_the_whole_picture() -> None:
    svg = loss_curve([(1, 2.0)], [])
    assert svg is not None
    kind, _, content = data_uri(svg).partition(",")
    assert kind == "data:image/svg+xml;base64" and base64.b64decode(content).decode() == svg
