"""The HTML page of a run in a real browser: quiet console, no request, nothing cut off, all pictures drawn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcore.artifacts import Store
from tasks.run_page.page import write_page
from tests.unit.tasks.run_page.made_store import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="make test-ui installs Playwright")
pytestmark = [pytest.mark.ui, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)")]

PHONE, WIDE = 375, 1280
"""Pixels."""
LEAST_CONTRAST = 4.5
"""Of text against its ground (WCAG 2.2, level AA)."""

CONTRASTS = """() => {
  const channel = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = colour => {
    const [red, green, blue] = colour.match(/[\\d.]+/g).map(Number).map(channel);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return getComputedStyle(document.body).backgroundColor;
  };
  return [...document.querySelectorAll('main *, header *')]
    .filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
    .filter(element => !['title', 'desc', 'option'].includes(element.tagName))
    .map(element => {
      const style = getComputedStyle(element);
      const colour = element.tagName === 'text' ? style.fill : style.color;
      const [low, high] = [light(colour), light(ground(element))].sort((one, other) => one - other);
      return [(high + 0.05) / (low + 0.05), element.outerHTML.slice(0, 80)];
    });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module", params=["done", "rejected"])
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("page") / "store")
    is_done = request.param == "done"
    return write_page(store, make_run(store, "small", state=request.param, until=None if is_done else "compare"))


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Any]:
    """Opens the page at a width; in the end nothing may have been complained of or asked for."""
    complaints: list[str] = []
    pages = []

    def open_page(width: int, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on(
            "request", lambda request: request.url in ("data:,", page_file.as_uri()) or complaints.append(request.url)
        )
        page.goto(page_file.as_uri())
        page.wait_for_load_state("networkidle")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


@pytest.mark.parametrize("width", [PHONE, WIDE])
def test_nothing_is_wider_than_the_screen(opened: Any, width: int) -> None:
    page = opened(width)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = page.locator("section, figure, .table, pre, nav").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.right])"
    )
    assert len(boxes) > 15 and all(0 <= left < right <= width for left, right in boxes)


def test_wide_tables_scroll_inside_themselves(opened: Any) -> None:
    page = opened(PHONE)
    scrolled = page.locator(".table").evaluate_all(
        "all => all.map(one => [one, Math.min(50, one.scrollWidth - one.clientWidth)]).filter(([_, more]) => more > 0)"
        ".map(([one, more]) => (one.scrollLeft = more, [one.scrollLeft, more]))"
    )
    assert len(scrolled) > 3 and all(moved == more for moved, more in scrolled)


@pytest.mark.parametrize("width", [PHONE, WIDE])
def test_all_pictures_are_drawn(opened: Any, width: int) -> None:
    page = opened(width)
    pictures = page.locator("svg.chart")
    assert pictures.count() == 6
    for picture in pictures.all():
        box = picture.bounding_box()
        assert box["width"] > 300 and box["height"] > 150
        assert picture.locator("> title").inner_html() and picture.locator("> desc").inner_html()
        marks = picture.locator("polyline, circle, rect").evaluate_all("all => all.map(one => one.getBBox())")
        assert marks
        letters = picture.locator("text").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
        assert min(letters) > 9  # pixels: they can be read on a phone


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(opened: Any, scheme: str) -> None:
    page = opened(WIDE, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100 and [one for one in found if one[0] < LEAST_CONTRAST] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


def test_it_prints(opened: Any) -> None:
    page = opened(WIDE, "dark")
    assert page.pdf(format="A4").startswith(b"%PDF-")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".table").first.evaluate("one => getComputedStyle(one).overflowX") == "visible"


def test_links_lead_to_parts_of_the_page(opened: Any) -> None:
    page = opened(PHONE)
    links = page.locator("nav a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
    assert len(links) > 5 and all(page.locator(link).count() == 1 for link in links)
