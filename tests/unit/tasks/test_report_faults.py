"""A report that can't be written or shown: a warning, and the run ends as it would have ended."""

import logging
from pathlib import Path

import pytest
from prefect import flow

from mcore.errors import GateError
from tasks.preflight import check_run
from tasks.report import reported
from tasks.stage import PlannedRun
from tests.unit.tasks.model_folders import write_workspace

pytestmark = pytest.mark.usefixtures("prefect_api_url")


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlannedRun:
    monkeypatch.chdir(tmp_path)
    checked = check_run(write_workspace(tmp_path) | {"evaluate": None})
    return PlannedRun(checked.run, checked.store, {plan.name: plan for plan in checked.stages})


@flow(name="reported")
def reported_flow(planned: PlannedRun, error: Exception | None) -> str:
    with reported(planned):
        if error is not None:
            raise error
    return "done"


def no_folder(planned: PlannedRun) -> None:
    """A file where the run's folder should be."""
    folder = planned.store.run_dir(planned.run.name)
    folder.parent.mkdir(parents=True)
    folder.touch()


def no_curve(planned: PlannedRun) -> None:
    """A loss that can't be drawn."""
    plan = planned.plans["train"]
    partial = planned.store.partial(plan.kind, plan.key)
    partial.mkdir(parents=True)
    (partial / "metrics.jsonl").write_text('{"iteration": 1, "loss": "low"}\n')


@pytest.mark.parametrize("fault", [no_folder, no_curve])
@pytest.mark.parametrize("error", [None, GateError("not the same model")])
def test_a_report_that_fails_changes_no_ending(planned, caplog, fault, error) -> None:
    fault(planned)
    with caplog.at_level(logging.WARNING, logger="prefect.flow_runs"):
        if error is None:
            assert reported_flow(planned, None) == "done"
        else:
            with pytest.raises(GateError) as caught:
                reported_flow(planned, error)
            assert caught.value.exit_status == 3
    (warning,) = [text for text in caplog.messages if text.startswith("the report can't be written: ")]
    assert warning.removeprefix("the report can't be written: ").partition(":")[0] in {
        "FileExistsError", "TypeError", "ValueError",
    }  # fmt: skip
