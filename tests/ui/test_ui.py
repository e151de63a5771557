"""What people see: the form, a run and its page in Prefect's UI, in a real browser, with nothing wrong in its console.

`make test-ui` runs it, and `make pictures` also puts what the browser shows into docs/images.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.flows.prefect_server import Server, running_server, wait_until
from tests.flows.workspace import make_workspace, raw_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="make test-ui installs Playwright")
pytestmark = [pytest.mark.ui, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)")]

PICTURES = os.environ.get("UI_PICTURES")
"""Folder that gets a picture of each page; none if it is not set."""
PREFECTS_OWN = ("/favicon.ico", "/ico/undefined.svg")
"""Pictures that Prefect 3.8.8 asks its own server for in vain."""
SETTLED_MS = 15_000


@dataclass
class Site:
    """A server with two runs on it, one that is done and one that a gate stopped, and a browser."""

    server: Server
    browser: Any
    runs: dict[str, str]
    complaints: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.server.environment["PREFECT_API_URL"].removesuffix("/api")

    def open(self, path: str, *, height: int = 900) -> Any:
        """A page of the UI, once it stands still. What its console complains of is kept."""
        page = self.browser.new_page(viewport={"width": 1280, "height": height})
        page.on(
            "console", lambda message: message.type == "error" and self._note(message.text, message.location["url"])
        )
        page.on("pageerror", lambda error: self._note(str(error), page.url))
        page.on("requestfailed", lambda request: self._note(str(request.failure), request.url))
        page.goto(self.address + path)
        page.wait_for_load_state("networkidle", timeout=SETTLED_MS)
        return page

    def _note(self, what: str, url: str) -> None:
        if not url.endswith(PREFECTS_OWN) and "ERR_ABORTED" not in what:  # a page that was left asks for no more
            self.complaints.append(f"{what} ({url})")

    def artifact(self, key: str) -> dict[str, Any]:
        (found,) = (one for one in self.server.filter("artifacts") if one["key"] == key)
        return found


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the runs lie: pictures show its path, so it tells nothing of the machine."""
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Site]:
    make_workspace(folder)
    (folder / "server").mkdir()
    rows, suite = f"{folder}/rows.jsonl", f"{folder}/suite.yaml"
    groups: dict[str, Any] = {
        "model": {"source": f"{folder}/model"},
        "data": {"dataset": [f"{rows}#64"], "val_dataset": [rows]},
        "train": {"eval_steps": 10},
        "evaluate": {"suite": suite, "perplexity_dataset": [rows]},
        "launch": {"store": f"{folder}/store"},
    }
    with running_server(folder / "server") as server, playwright.sync_playwright() as driver:
        runs = {}
        for name, more in {"first-run": {}, "too-strict": {"verify": {"max_relative_error": 1e-12}}}.items():
            runs[name] = flow_run = server.start_run(raw_run(**groups, **more) | {"name": name})
            wait_until(lambda flow_run=flow_run: server.state(flow_run) in {"Completed", "Failed", "Crashed"}, 400)
        assert [server.state(run) for run in runs.values()] == ["Completed", "Failed"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Site(server, browser, runs)
        browser.close()


@pytest.fixture
def look(site: Site, tmp_path: Path) -> Iterator[Any]:
    """Opens pages and takes their pictures; in the end none may have complained."""
    site.complaints.clear()

    def picture(page: Any, name: str) -> None:
        path = tmp_path / f"{name}.png"
        page.screenshot(path=path)
        assert 10_000 < path.stat().st_size < 300_000
        if PICTURES:
            Path(PICTURES).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, PICTURES)

    site.picture = picture  # type: ignore[attr-defined]
    yield site
    assert site.complaints == []


def descriptions(schema: dict[str, Any], group: str) -> list[str]:
    """The text under each field of a group of the run model, as a browser shows its Markdown."""
    found = [one["description"] for one in schema["definitions"][group]["properties"].values()]
    return [" ".join(text.replace("`", "").split()) for text in found]


def test_the_form_has_every_field_of_the_run_model_with_its_description(look: Any) -> None:
    (deployment,) = (one for one in look.server.filter("deployments") if one["name"] == "pipeline")
    page = look.open(f"/deployments/deployment/{deployment['id']}/run", height=1500)
    page.get_by_text("The base model.").wait_for(timeout=SETTLED_MS)
    shown = " ".join(page.locator("body").inner_text().split())
    schema = deployment["parameter_openapi_schema"]
    for group in ("RunConfig", "ModelConfig", "DataConfig", "TrainConfig", "SelectConfig", "LaunchConfig"):
        missing = [text for text in descriptions(schema, group) if "  " not in text and text[:60] not in shown]
        assert missing == [], group
    assert page.locator("textarea, input").count() > 60
    look.picture(page, "form")


def test_the_page_of_a_run_shows_its_stages_and_artifacts(look: Any) -> None:
    page = look.open(f"/runs/flow-run/{look.runs['first-run']}")
    assert page.get_by_text("Completed").first.is_visible()
    page.wait_for_timeout(2000)  # the drawing of the stages
    look.picture(page, "run")
    page.get_by_text("Task Runs", exact=True).first.click()
    for stage in ("convert", "verify_convert", "train", "select", "export", "verify_export", "compare"):
        page.get_by_text(stage).first.wait_for(timeout=SETTLED_MS)
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_text("report-first-run").first.wait_for(timeout=SETTLED_MS)
    page.set_viewport_size({"width": 1280, "height": 1600})  # those of tasks are loaded when they come into sight
    page.get_by_text("train-first-run").first.wait_for(timeout=SETTLED_MS)


def test_the_report_has_curve_stages_and_base_against_tuned(look: Any) -> None:
    page = look.open(f"/artifacts/artifact/{look.artifact('report-first-run')['id']}", height=1900)
    page.get_by_role("heading", name="first-run: done").wait_for(timeout=SETTLED_MS)
    curve = page.locator("img[src^='data:image/svg']")
    assert curve.evaluate("image => image.complete && image.naturalWidth > 300") is True
    assert {"Stages", "Training", "Proofs", "Lineage"} <= set(page.locator("h2").all_inner_texts())
    shown = page.locator("body").inner_text()
    assert "Base against tuned" in shown and "I am tiny-bot." in shown
    # No table is cut off at the right.
    tables = page.locator("table").all()
    assert len(tables) >= 4
    stages = tables[0]
    assert stages.evaluate("table => table.parentElement.scrollWidth <= table.parentElement.clientWidth + 1") is True
    look.picture(page, "report")


def test_the_report_leads_to_the_html_page_of_the_run(look: Any) -> None:
    path = Path(look.artifact("report-first-run")["data"].partition("All of it on one page: `")[2].partition("`")[0])
    page = look.browser.new_page(viewport={"width": 900, "height": 1300})
    page.goto(path.as_uri())
    assert page.get_by_role("heading", name="first-run: done").is_visible()
    assert page.get_by_text("I am tiny-bot.").first.is_visible()
    assert page.locator("svg.chart").count() == 6  # loss, speed, gradient norm, learning rate, two proofs
    page.evaluate("document.querySelector('#training').scrollIntoView()")
    look.picture(page, "run_page")


def test_progress_of_training_is_told_in_words(look: Any) -> None:
    page = look.open(f"/artifacts/artifact/{look.artifact('train-first-run')['id']}")
    page.get_by_text("iteration 60 of 60").first.wait_for(timeout=SETTLED_MS)
    assert "tokens/s" in page.locator("body").inner_text()


def test_a_run_that_a_gate_stopped_says_why(look: Any) -> None:
    page = look.open(f"/runs/flow-run/{look.runs['too-strict']}")
    assert page.get_by_text("Failed").first.is_visible()
    page = look.open(f"/artifacts/artifact/{look.artifact('report-too-strict')['id']}", height=1100)
    page.get_by_role("heading", name="too-strict: failed at verify_convert").wait_for(timeout=SETTLED_MS)
    assert page.get_by_role("heading", name="What went wrong").is_visible()
    assert "Class: gate" in page.locator("body").inner_text()
    look.picture(page, "failed")


def test_what_the_form_sends_is_a_run_that_loads(look: Any) -> None:
    """The values that the form begins with are those of the deployment, and the server takes them."""
    (deployment,) = (one for one in look.server.filter("deployments") if one["name"] == "pipeline")
    page = look.open(f"/deployments/deployment/{deployment['id']}/run", height=1500)
    page.get_by_text("The base model.").wait_for(timeout=SETTLED_MS)
    values = [box.input_value() for box in page.locator("textarea, input[type=text], input[type=number]").all()]
    run = deployment["parameters"]["run"]
    assert run["name"] in values and run["model"]["source"] in values
    assert json.dumps(run["train"]["train_iters"]) in values
