"""A run is on record while its stages run, and says how it ended, whatever ended it. Prefect is a real server."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect import flow

from configs.schema.run import RunConfig
from mcore.artifacts import ArtifactRef, Store
from mcore.errors import EvaluationGateError, InputError, StoppedError
from mcore.runs import Failure, current, history, is_under_way
from tasks.graph import StagePlan
from tasks.stage import Outcome, PlannedRun
from tasks.turn import alone
from tests.unit.tasks import named_run

pytestmark = pytest.mark.usefixtures("prefect_api_url")


class Cancelled(BaseException):
    """What is no error, as Prefect's own signal."""


@pytest.fixture
def planned(tmp_path: Path) -> PlannedRun:
    run = RunConfig.model_validate(
        {
            "name": "noted",
            "model": {"source": "model"},
            "data": {"dataset": ["none.jsonl"]},
            "train": {"train_iters": 1},
        }
    )
    plans = {
        "convert": StagePlan("convert", "convert", "c" * 20, {}, {"hf": "local/h"}),
        "compare": StagePlan("compare", "compare", "d" * 20, {}, {"base": "evaluate/b"}),
    }
    return PlannedRun(run, Store(tmp_path / "store"), plans)


@flow
def noted_flow(planned: PlannedRun, error: BaseException | None) -> None:
    with alone(planned):
        seen = current(planned.store, "noted")
        assert seen is not None and seen.state == "running" and is_under_way(planned.store, "noted")
        planned.outcomes.append(Outcome("convert", ArtifactRef("convert", "c" * 20, ""), True, 0.25))
        if error is not None:
            raise error
        planned.outcomes.append(Outcome("compare", ArtifactRef("compare", "d" * 20, ""), False, 1.5))


def test_a_run_that_is_done(planned: PlannedRun) -> None:
    noted_flow(planned, None)
    record = current(planned.store, "noted")
    assert record is not None and record.ended is not None and record.started < record.ended
    assert (record.state, record.flow, record.failure, record.folder) == ("done", "noted-flow", None, str(Path.cwd()))
    assert record.config == planned.run.model_dump(mode="json")
    assert [(stage.name, stage.artifact) for stage in record.stages] == [
        ("convert", f"convert/{'c' * 20}"), ("compare", f"compare/{'d' * 20}"),
    ]  # fmt: skip
    assert record.outcomes == {
        "convert": {"cached": True, "seconds": 0.25}, "compare": {"cached": False, "seconds": 1.5},
    }  # fmt: skip
    assert "<title>noted: done</title>" in (planned.store.run_dir("noted") / "report.html").read_text()


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (EvaluationGateError("not good enough", ["identity"]), "rejected"),
        (StoppedError("stopped at train"), "stopped"),
        (InputError("wrong input\nsecond line"), "failed"),
        (RuntimeError("a defect"), "failed"),
        (Cancelled("TERM"), "cancelled"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_run_that_ends_otherwise(planned: PlannedRun, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)):
        noted_flow(planned, error)
    record = current(planned.store, "noted")
    assert record is not None and record.state == state and not is_under_way(planned.store, "noted")
    summary = str(getattr(error, "summary", error)).partition("\n")[0]
    assert record.failure == Failure("compare", f"compare/{'d' * 20}", type(error).__name__, summary)
    page = (planned.store.run_dir("noted") / "report.html").read_text()
    assert f"<title>noted: {state}</title>" in page and "What went wrong" in page and type(error).__name__ in page


def test_a_page_that_cannot_be_written_fails_no_run(planned: PlannedRun) -> None:
    (planned.store.run_dir("noted") / "report.html").mkdir(parents=True)
    noted_flow(planned, None)
    record = current(planned.store, "noted")
    assert record is not None and record.state == "done"


def test_a_killed_run_is_lost_and_the_next_one_remembers_it(tmp_path: Path, prefect_api_url: str) -> None:
    environment = {**os.environ, "PREFECT_API_URL": prefect_api_url}
    store = Store(tmp_path / "store")
    arguments = [named_run.__file__, str(store.root), "a" * 20, "print('started', flush=True)\ntime.sleep(600)"]
    process = subprocess.Popen([sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL)
    log = store.run_dir("named") / "work" / "stage.log"
    deadline = time.monotonic() + 90
    while not (log.exists() and "\nstarted" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    running = current(store, "named")
    assert running is not None and (running.state, running.pid) == ("running", process.pid)
    process.kill()
    process.wait()
    lost = current(store, "named")
    assert lost is not None and lost.state == "lost" and lost.ended is None
    arguments[-1] = "(out / 'weights').write_text('weights')"
    subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)
    assert [record.state for record in history(store, "named")] == ["lost", "done"]
