"""A run that is killed or loses its training process ends, when it is started again, as if nothing had happened.

And of two runs that want the same one makes it, also if that one is killed meanwhile.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.disturbed import BASE, exported_weights, result_of, wait_for_iteration
from tests.flows import run_pipeline
from tests.flows.workspace import make_workspace, raw_run

pytestmark = pytest.mark.faults

RUN = raw_run(evaluate=None, train={"train_iters": 400, "save_steps": 100, "eval_steps": 400})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_workspace(folder)
    return folder


def start(folder: Path, store: str, name: str = "tiny", **launch: object) -> subprocess.Popen:
    run_file = folder / f"{store}-{name}.json"
    run_file.write_text(json.dumps(RUN | {"name": name, "launch": RUN["launch"] | {"store": store} | launch}))
    return subprocess.Popen(
        [sys.executable, run_pipeline.__file__, run_file.name],
        cwd=folder,
        env={**os.environ, "PREFECT_HOME": str(folder / "prefect")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def training_processes(store: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "mcore.train" in (process.info["cmdline"] or []) and str(store) in " ".join(process.info["cmdline"])
    ]


@pytest.fixture(scope="module")
def undisturbed(workspace) -> bytes:
    result_of(start(workspace, "undisturbed"))
    return exported_weights(workspace, "undisturbed")


def test_kill_9_of_the_flow_while_it_trains(workspace, undisturbed):
    store = workspace / "killed"
    flow = start(workspace, "killed")
    wait_for_iteration(store, 150)
    flow.kill()
    flow.communicate()
    result = result_of(start(workspace, "killed"))  # at once: it has to wait for the processes of the first
    assert {outcome["name"] for outcome in result["outcomes"] if outcome["cached"]} == BASE
    assert exported_weights(workspace, "killed") == undisturbed
    log = (store / "runs" / "tiny" / "train" / "stage.log").read_text()
    assert "resuming behind iteration" in log
    assert not training_processes(store)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_process_that_is_lost_is_started_again(workspace, undisturbed, number):
    name = f"lost_{number.name.lower()}"
    store = workspace / name
    flow = start(workspace, name)
    wait_for_iteration(store, 150)
    ranks = [found for found in training_processes(store) if "torch.distributed.run" not in found.info["cmdline"]]
    ranks[0].send_signal(number)
    result_of(flow)
    assert exported_weights(workspace, name) == undisturbed
    log = (store / "runs" / "tiny" / "train" / "stage.log").read_text()
    assert log.count("$ ") == 2 and "resuming behind iteration" in log


MADE = (*sorted(BASE), "train", "select", "export", "verify_export")


def executions(store: Path) -> int:
    """How often training was started."""
    logs = list(store.glob("runs/*/train/stage.log"))
    return sum(log.read_text().count("$ ") for log in logs)


def made_by(result: dict) -> set[str]:
    return {outcome["name"] for outcome in result["outcomes"] if not outcome["cached"]}


def test_two_runs_at_once_make_everything_once(workspace, undisturbed):
    store = workspace / "twice"
    both = [start(workspace, "twice", name) for name in ("one", "two")]
    results = [result_of(process) for process in both]
    made = [made_by(result) for result in results]
    assert made[0] | made[1] == set(MADE) and not made[0] & made[1]
    assert exported_weights(workspace, "twice") == undisturbed and executions(store) == 1
    assert all((store / "runs" / name / "model").exists() for name in ("one", "two"))


def wait_for_heir(store: Path) -> None:
    """Wait until a run waits for the training of another."""
    deadline = time.monotonic() + 300
    while not list(store.glob(".leases/train-*/waits-*.json")):
        assert time.monotonic() < deadline, "nobody waits"
        time.sleep(0.05)


def training_run(store: Path) -> str:
    """Name of the run that trains."""
    (claim,) = store.glob(".leases/train-*/*.held")
    return json.loads(claim.read_text())["run"]


@pytest.mark.parametrize("also_supervisor", [False, True])
def test_kill_9_of_the_run_that_trains_while_another_waits(workspace, undisturbed, also_supervisor):
    name = "both" if also_supervisor else "heir"
    store = workspace / name
    flows = {run: start(workspace, name, run) for run in ("one", "two")}
    wait_for_iteration(store, 120)
    wait_for_heir(store)
    first = training_run(store)
    second = next(run for run in flows if run != first)
    if also_supervisor:
        (work,) = store.glob(".leases/train-*/*.work")
        os.kill(json.loads(work.read_text())["supervisor"]["pid"], signal.SIGKILL)
    flows[first].kill()
    flows[first].communicate()
    result = result_of(flows[second])
    assert {"train", "select", "export", "verify_export"} <= made_by(result)
    assert exported_weights(workspace, name) == undisturbed
    assert not training_processes(store)
    assert executions(store) == (2 if also_supervisor else 1)
    log = (store / "runs" / second / "train" / "stage.log").read_text()
    assert ("resuming behind iteration" in log) == also_supervisor


def test_the_same_run_started_again_goes_on_with_the_training_that_was_left(workspace, undisturbed):
    store = workspace / "left"
    flow = start(workspace, "left", reattach_s=120.0)
    wait_for_iteration(store, 120)
    ranks = {process.pid for process in training_processes(store)}
    flow.kill()
    flow.communicate()
    result_of(start(workspace, "left", reattach_s=120.0))
    assert exported_weights(workspace, "left") == undisturbed and executions(store) == 1
    assert not any(psutil.pid_exists(pid) for pid in ranks)
