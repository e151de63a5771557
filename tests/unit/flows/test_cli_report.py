"""`mcore-flows report NAME --html` writes the page from the store, whatever became of the run."""

from pathlib import Path

from mcore.artifacts import Store
from mcore.runs import RunRecord, begin
from tests.unit.flows.command_line import mcore_flows
from tests.unit.tasks.run_page.made_store import make_run


def test_the_page_of_a_run_that_was_killed_is_written_from_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    record = make_run(store, "small")
    begin(store, RunRecord("small", "pipeline", record.config, record.stages, "", 1, record.started))
    done = mcore_flows("report", "small", "--html", cwd=tmp_path)
    page = store.run_dir("small") / "report.html"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{page}\n", "")
    text = page.read_text()
    assert "<title>small: lost</title>" in text and text.count("in the store") == 7
    assert "Training and validation loss" in text


def test_no_such_run_is_wrong_input(tmp_path: Path) -> None:
    done = mcore_flows("report", "small", "--html", cwd=tmp_path)
    assert done.returncode == 2 and "small: expected a run that was started" in done.stderr
    outside = mcore_flows("report", "../small", "--html", cwd=tmp_path)
    assert outside.returncode == 2 and list(tmp_path.iterdir()) == []
