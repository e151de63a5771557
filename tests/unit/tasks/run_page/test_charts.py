"""Pictures of the page: everything that was measured is drawn, inside the picture."""

import math
import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from tasks.run_page.charts import HEIGHT, LEFT, WIDTH, bars, curves, errors_of_parts

SPACE = "{http://www.w3.org/2000/svg}"


def drawn(picture: Markup | None) -> ElementTree.Element:
    assert picture is not None
    return ElementTree.fromstring(picture)


def labels(picture: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in picture.iter(f"{SPACE}text")]


def test_nothing_to_draw_is_no_picture() -> None:
    assert curves("loss", {"training": []}) is None and errors_of_parts("errors", [], 1e-4) is None
    assert bars("lengths", [], "tokens") is None


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-30, 1e12])
def test_a_line_stays_inside_whatever_its_values(value: float) -> None:
    picture = drawn(curves("loss", {"training": [(1, value)], "validation": [(1, value), (9, value)]}))
    points = [point.split(",") for line in picture.iter(f"{SPACE}polyline") for point in line.attrib["points"].split()]
    assert len(points) == 3 and len(list(picture.iter(f"{SPACE}circle"))) == 1  # the one point can be seen
    assert all(LEFT <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in points)


def test_errors_stand_on_their_side_of_the_gate() -> None:
    errors = [("embedding", 0.0), ("a<b>", 1e-6), ("mlp", 2e-3), ("head", math.nan), ("last", math.inf)]
    picture = drawn(errors_of_parts("errors", errors, 1e-4))
    gate = float(next(line for line in picture.iter(f"{SPACE}line") if line.get("class") == "gate").attrib["y1"])
    dots = list(picture.iter(f"{SPACE}circle"))
    assert [dot.attrib["class"] for dot in dots] == ["dot passed"] * 2 + ["dot failed"] * 3
    heights = [float(dot.attrib["cy"]) for dot in dots]
    assert [height > gate for height in heights] == [True, True, False, False, False]
    assert heights[0] == max(heights) and heights[3] == heights[4] == min(heights)
    assert "0" in labels(picture) and picture.find(f"{SPACE}desc").text.startswith(
        "5 parts, the worst is head with nan"
    )
    assert re.search("a<b>: 1e-06", "".join(dots[1].itertext()))


def test_a_scale_without_exact_parts_has_no_zero() -> None:
    assert "0" not in labels(drawn(errors_of_parts("errors", [("head", 1e-6)], 1e-4)))


def test_bars_are_as_high_as_their_counts() -> None:
    picture = drawn(bars("lengths", [("0-63", 10), ("64-127", 5), ("128-", 0)], "tokens"))
    heights = [float(bar.attrib["height"]) for bar in picture.iter(f"{SPACE}rect")]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2) and heights[2] == 0
    assert {"0-63", "64-127", "128-", "10"} <= set(labels(picture))
