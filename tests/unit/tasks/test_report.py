"""The page of a run: from the store, for a run that is done and for one that failed."""

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.actions import ArtifactCreate

from configs.schema.run import RunConfig
from mcore.artifacts import Store
from mcore.errors import GateError, StoppedError, TrainingError
from tasks.graph import StagePlan, stages
from tasks.preflight import check_run
from tasks.report import artifact_key, report_page, reported, write_report
from tasks.stage import Outcome, PlannedRun
from tests.unit.tasks.model_folders import write_workspace

METRICS: dict[str, dict[str, Any]] = {
    "convert": {"num_tensors": 19, "num_parameters": 90_624, "bytes": 3072, "seconds": 1.0, "nested": {"left": "out"}},
    "verify_convert": {"num_tensors": 19, "num_differing_tensors": 0, "relative_error": 2.5e-6, "passed": True},
    "select": {"iteration": 10, "reason": "lowest | of 2"},
}


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlannedRun:
    """A run of which nothing was made yet."""
    monkeypatch.chdir(tmp_path)
    checked = check_run(write_workspace(tmp_path) | {"evaluate": None})
    raw = checked.run.model_dump() | {"evaluate": {"suite": "suite.yaml"}}
    run = RunConfig.model_validate(raw)  # with evaluation, but no need for a vLLM that answers
    store = Store(tmp_path / "store")
    return PlannedRun(run, store, {plan.name: plan for plan in stages(run, checked.source, store)})


def make(planned: PlannedRun, *names: str, cached: bool = False) -> None:
    """Commit artifacts as the stages of these names would."""
    for name in names:
        plan = planned.plans[name]
        folder = planned.store.partial(plan.kind, plan.key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file").write_text(name)
        if name == "train":
            write_metrics(folder)
        if name == "compare":
            (folder / "comparison.md").write_text("# Base against tuned: small\n\n## Gates\n")
        artifact = planned.store.commit(
            plan.kind,
            plan.key,
            inputs=plan.inputs,
            input_content={},
            ingredients=plan.ingredients,
            metrics=METRICS.get(name, {}),
            versions={"torch": "2.13.0", "code": "0123456789abcdef", "python": "3.11.7"},
            duration_s=1.0,
        )
        planned.outcomes.append(Outcome(name, artifact, cached, 75.0))


def write_metrics(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [
        {"iteration": number, "loss": 4.0 / number, "tokens_per_s": 1000.0 * number} for number in range(1, 11)
    ]
    lines += [{"iteration": 5, "validation_loss": 0.9}, {"iteration": 10, "validation_loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def everything(planned: PlannedRun) -> list[str]:
    return list(planned.plans)


def test_a_run_that_is_done(planned: PlannedRun) -> None:
    make(planned, "convert", cached=True)
    make(planned, *[name for name in everything(planned) if name != "convert"])
    path = write_report(planned)
    page = path.read_text()
    assert path == planned.store.run_dir("small") / "report.md"
    assert page.startswith("# small: done\n")
    key = planned.plans["convert"].key[:8]
    assert f"| convert | cached | made in 1.0 s | 90,624 parameters, 3.1 kB | `{key}` |" in page
    assert "| 0 tensors differ, error 2.5e-06 |" in page and "| iteration 10, lowest \\| of 2 |" in page
    assert "| train | made |" in page and "lowest \\| of 2" in page
    assert "10 iterations, loss 4.0000 to 0.4000" in page
    assert "lowest validation loss 0.5000 at iteration 10" in page and "6,000 tokens/s" in page
    assert "![training and validation loss](loss.svg)" in page
    assert (path.parent / "loss.svg").read_text().startswith("<svg")
    assert "## Base against tuned: small" in page and "### Gates" in page  # a level lower than in its own file
    assert "| verify_convert | 19 | 0 | 2.5e-06 |" in page
    assert page.count("\n| `") == 6  # export, train, prepare, select, convert, proof: each once


def test_lineage_goes_back_to_data_and_base(planned: PlannedRun) -> None:
    make(planned, *everything(planned))
    done = {outcome.name: outcome.artifact for outcome in planned.outcomes}
    kinds = [manifest.kind for manifest in planned.store.lineage(f"export/{done['export'].key}")]
    assert kinds[0] == "export" and sorted(kinds) == ["convert", "export", "prepare", "select", "train", "verify"]
    page = report_page(planned, None)
    rows = planned.plans["prepare"].ingredients["config"]["data.dataset"][0][:12]
    assert f"data.dataset {rows}" in page and "code 0123456789ab" in page
    base = planned.plans["convert"].inputs["hf"]
    assert f"hf `local/{base.partition('/')[2][:8]}`" in page


def test_a_run_that_failed_says_where_and_why(planned: PlannedRun) -> None:
    make(planned, "prepare", "convert", "verify_convert")
    train = planned.plans["train"]
    write_metrics(planned.store.partial(train.kind, train.key))
    page = write_report(planned, TrainingError("the loss is NaN", ["iteration 7"])).read_text()
    assert page.startswith("# small: failed at train\n")
    assert "```\nthe loss is NaN\n  - iteration 7\n```" in page
    assert "| verify_convert | made |" in page and "| train | failed |" in page and "| export | not reached |" in page
    assert "10 iterations" in page and "![training" in page  # as far as it got
    assert "## Proofs" in page and "## Lineage" in page


def test_what_a_failed_gate_found_is_on_the_page(planned: PlannedRun) -> None:
    make(planned, "prepare", "convert")
    kept = planned.stage_dir("verify_convert")
    kept.mkdir(parents=True)
    (kept / "report.md").write_text("# Verification: FAILED\n")
    page = report_page(planned, None, GateError("not the same model"))
    assert "# small: failed at verify_convert" in page and "\n## Verification: FAILED\n" in page


def test_a_run_that_failed_at_once_has_a_page_too(planned: PlannedRun) -> None:
    page = report_page(planned, None, RuntimeError())
    assert "# small: failed at prepare" in page and "```\nRuntimeError\n```" in page and "stage.log" not in page
    assert "## Lineage" not in page and "## Training" not in page


def test_the_error_goes_on_its_way_and_the_page_is_there(planned: PlannedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[BaseException | None] = []
    monkeypatch.setattr("tasks.report._show", lambda planned, error=None: shown.append(error))
    for error, state in ((GateError("no"), "failed"), (SystemExit(), "stopped")):
        with pytest.raises(type(error)), reported(planned):
            raise error
        assert (planned.store.run_dir("small") / "report.md").read_text().startswith(f"# small: {state} at prepare")
    with reported(planned):
        make(planned, *everything(planned))
    assert (planned.store.run_dir("small") / "report.md").read_text().startswith("# small: done")
    assert [type(error) for error in shown] == [GateError, type(None)]  # nobody waits for a server while cancelling


@pytest.mark.parametrize("name", ["demo", "a_b.c-d", "0_", "x--y", "smollm2_135m_cpu"])
def test_prefect_takes_the_key(name: str) -> None:
    key = artifact_key(name)
    assert ArtifactCreate(key=key, type="markdown", data="x").key == key
    with pytest.raises(ValueError, match="key"):
        ArtifactCreate(key="report-a_b", type="markdown", data="x")


def test_plans_of_the_fixture_are_the_graphs(planned: PlannedRun) -> None:
    assert everything(planned)[0] == "prepare" and everything(planned)[-1] == "compare"
    assert all(isinstance(plan, StagePlan) for plan in planned.plans.values())


def test_what_is_reused_says_how_long_it_took_when_it_was_made(planned: PlannedRun) -> None:
    make(planned, "convert", cached=True)
    make(planned, "verify_convert")
    page = report_page(planned, None)
    assert "| convert | cached | made in 1.0 s |" in page and "| verify_convert | made | 1 min 15 s |" in page


def test_ctrl_c_is_told_as_a_stop_that_can_go_on(planned: PlannedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.report._show", lambda planned, error=None: None)
    make(planned, "prepare", "convert", "verify_convert")
    with pytest.raises(StoppedError) as stopped, reported(planned):
        raise KeyboardInterrupt
    expected = "stopped at train before anything was saved"
    assert stopped.value.summary == expected and stopped.value.exit_status == 75
    page = (planned.store.run_dir("small") / "report.md").read_text()
    assert page.startswith("# small: stopped at train\n") and "| train | stopped |" in page
    assert expected in page and "Run the same command again to go on." in page and "wrong" not in page


def test_a_cancelled_run_is_no_failed_one(planned: PlannedRun) -> None:
    page = report_page(planned, None, SystemExit())
    assert "# small: stopped at prepare" in page and "failed" not in page
