"""Stages over the store: made once, reused while whole, made again when damaged, retried only where that helps.

Commands are small, but real child processes; Prefect is a real server.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from configs.schema.run import RunConfig
from mcore.artifacts import ArtifactRef, Manifest, Store
from mcore.errors import GateError, InfrastructureError, InputError, LaunchError
from tasks.convert import convert
from tasks.graph import StagePlan
from tasks.stage import PlannedRun
from tests.unit.tasks import toy_flow
from tests.unit.tasks.toy_flow import run_toy

pytestmark = pytest.mark.usefixtures("prefect_api_url")


@pytest.fixture
def store(tmp_path):
    (tmp_path / "store" / ".partial").mkdir(parents=True)
    return tmp_path / "store"


def executions(store: Path) -> int:
    file = store.parent / "executions"
    return len(file.read_text()) if file.exists() else 0


def test_made_once_then_reused(store):
    first, second = run_toy(store, "make()"), run_toy(store, "make()")
    assert (first.cached, second.cached, executions(store)) == (False, True, 1)
    assert first.artifact == second.artifact and first.artifact.metrics == {"num_tensors": 7}
    manifest = Manifest.read(Path(first.artifact.path))
    assert manifest.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest.versions["mcore-flows"] and manifest.versions["torch"]
    assert 0 < manifest.duration_s < 60


def test_reuse_is_seen_in_prefect(store):
    run_toy(store, "make()")
    run_toy(store, "make()")
    with get_client(sync_client=True) as client:
        runs = [run for run in client.read_task_runs(limit=50) if run.name.startswith("toy")]
    newest = max(runs, key=lambda run: run.start_time)
    deadline = time.monotonic() + 20  # task states travel as events
    while newest.state_name != "Cached" and time.monotonic() < deadline:
        time.sleep(0.2)
        with get_client(sync_client=True) as client:
            newest = client.read_task_run(newest.id)
    assert (newest.state_name, newest.state_type.value) == ("Cached", "COMPLETED")


def test_a_damaged_artifact_is_made_again(store):
    path = Path(run_toy(store, "make()").artifact.path)
    (path / "weights").write_text("Weights")
    assert not run_toy(store, "make()").cached
    assert (path / "weights").read_text() == "weights" and executions(store) == 2
    assert run_toy(store, "make()").cached


def test_behind_an_input_that_came_out_otherwise_it_is_made_again(store):
    run_toy(store, "make()")
    assert not run_toy(store, "make()", content="other").cached
    assert executions(store) == 2
    assert run_toy(store, "make()", content="other").cached


def test_a_lost_process_is_started_again_and_its_log_kept(store):
    code = "print('attempt')\nif count < 3: os.kill(os.getpid(), 9)\nmake()"
    assert not run_toy(store, code).cached
    assert executions(store) == 3
    assert (store / "runs" / "toys" / "toy" / "stage.log").read_text().count("\nattempt") == 3


@pytest.mark.parametrize(
    ("code", "error", "count"),
    [
        ("raise SystemExit(1)", LaunchError, 1),
        ("raise SystemExit(2)", InputError, 1),
        ("raise SystemExit(3)", GateError, 1),
        ("os.kill(os.getpid(), 9)", InfrastructureError, 2),
        ("print('RuntimeError: NCCL error: remote process exited')\nraise SystemExit(1)", LaunchError, 2),
        ("print('torch.OutOfMemoryError: CUDA out of memory')\nos.kill(os.getpid(), 9)", InfrastructureError, 1),
    ],
)
def test_what_is_started_again(store, code, error, count):
    with pytest.raises(error) as caught:
        run_toy(store, code, retries=1)
    assert type(caught.value) is error and executions(store) == count
    digest = json.loads((store / "runs" / "toys" / "toy" / "failure.json").read_text())
    assert (digest["attempt"], digest["error"]) == (count, error.__name__)
    assert f"Class: {digest['kind']}" in str(caught.value)
    assert not (store / "toy").exists()


def test_a_gate_that_says_no_keeps_its_report_and_commits_nothing(store):
    with pytest.raises(GateError):
        run_toy(store, "write('report.json', '{}')\nraise SystemExit(3)")
    assert (store / "runs" / "toys" / "toy" / "report.json").read_text() == "{}"
    assert not (store / "toy").exists() and not list((store / ".partial").iterdir())
    run_toy(store, "make()")
    assert not (store / "runs" / "toys" / "toy" / "report.json").exists(), "an old verdict must not stay beside a new"


def start_process(store: Path, code: str, url: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, toy_flow.__file__, str(store), code],
        env={**os.environ, "PREFECT_API_URL": url},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_runs_at_once_execute_once(store, prefect_api_url):
    processes = [start_process(store, "time.sleep(2)\nmake()", prefect_api_url) for _ in range(2)]
    answers = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert answers == ["cached=False", "cached=True"] and executions(store) == 1


def test_a_cancelled_flow_ends_its_child_and_commits_nothing(store, prefect_api_url):
    code = "make()\nwrite('pid', str(os.getpid()))\ntime.sleep(600)"
    process = start_process(store, code, prefect_api_url)
    note = store / ".partial" / "toy-0123456789abcdef0123" / "pid"
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    child = int(note.read_text())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not Path(f"/proc/{child}").exists()
    assert not (store / "toy").exists()


def test_a_flow_that_hands_on_other_inputs_than_planned_is_refused(store):
    run = RunConfig.model_validate(
        {
            "name": "toys",
            "model": {"source": "x"},
            "data": {"dataset": ["x"]},
            "train": {"train_iters": 1},
        }
    )
    planned = PlannedRun(run, Store(store), {"convert": StagePlan("convert", "convert", "k", {}, {"hf": "fetch/a"})})
    with pytest.raises(AssertionError, match="other inputs than the graph says"):
        convert(planned, hf=ArtifactRef("fetch", "b", "/nowhere"))
