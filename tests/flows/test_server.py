"""Deployments on a real Prefect server: deployed, picked up by a process worker, run, shown, cancelled."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.flows.workspace import CHECKOUT, raw_run

pytestmark = pytest.mark.server

PREFECT = Path(sys.executable).with_name("prefect")
DEPLOYMENT = "pipeline/pipeline"


@dataclass(frozen=True)
class Server:
    """A Prefect server with a worker, and a client for both."""

    environment: dict[str, str]
    client: httpx.Client

    def prefect(self, *arguments: str) -> str:
        """Output of a `prefect` command, run in the checkout."""
        done = subprocess.run(
            [PREFECT, "--no-prompt", *arguments], cwd=CHECKOUT, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def filter(self, kind: str, **filters: Any) -> list[dict[str, Any]]:
        """Objects of a kind, such as `task_runs`."""
        answer = self.client.post(f"/{kind}/filter", json=filters)
        answer.raise_for_status()
        return answer.json()

    def start_run(self, run: dict[str, Any]) -> str:
        """Start the deployment with another run than its own. Returns the flow run's id."""
        before = self.flow_runs("pipeline").keys()
        self.prefect("deployment", "run", DEPLOYMENT, "--params", json.dumps({"run": run}))
        (new,) = self.flow_runs("pipeline").keys() - before
        return new

    def flow_runs(self, deployment: str) -> dict[str, dict[str, Any]]:
        """Flow runs of a deployment by their ids."""
        found = self.filter("flow_runs", deployments={"name": {"any_": [deployment]}})
        return {flow_run["id"]: flow_run for flow_run in found}

    def state(self, flow_run_id: str) -> str:
        """Name of a flow run's state."""
        answer = self.client.get(f"/flow_runs/{flow_run_id}")
        answer.raise_for_status()
        return answer.json()["state_name"]


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


@contextmanager
def background(command: list[str | Path], log: Path, environment: dict[str, str], cwd: Path) -> Iterator[None]:
    """A process of its own session that is gone behind the block."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": url,
        "PREFECT_UI_API_URL": url,
    }
    start = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        background(start, folder / "server.log", environment, folder),
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        running = Server(environment, client)

        def answers() -> bool:
            try:
                return client.get("/health").is_success
            except httpx.TransportError:
                return False

        wait_until(answers, 120)
        running.prefect("work-pool", "create", "--type", "process", "mcore-flows")
        running.prefect("deploy", "--all")
        # Started elsewhere on purpose: the pull step has to find the checkout.
        worker = [PREFECT, "worker", "start", "--pool", "mcore-flows"]
        with background(worker, folder / "worker.log", environment, folder):
            yield running


@pytest.fixture
def elsewhere(workspace, finished):
    """A run with absolute paths: the worker does not work in the workspace."""

    def run(**groups: Any) -> dict[str, Any]:
        folder = workspace.folder
        groups = {
            "evaluate": None,
            "model": {"source": str(folder / "model")},
            "data": {"dataset": [f"{folder}/rows.jsonl#64"], "val_dataset": [f"{folder}/rows.jsonl"]},
        } | groups
        return raw_run(**groups) | {"launch": raw_run()["launch"] | {"store": str(workspace.store)}}

    return run


def test_deployments_hold_no_path_of_this_machine(server):
    deployments = {deployment["name"]: deployment for deployment in server.filter("deployments")}
    assert deployments.keys() == {"pipeline", "nightly"}
    assert str(CHECKOUT) not in json.dumps(deployments)
    (schedule,) = deployments["nightly"]["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("0 3 * * *", "Etc/UTC")


def test_the_server_schedules_the_nightly_runs(server):
    wait_until(lambda: bool(server.flow_runs("nightly")), 60)
    for flow_run in server.flow_runs("nightly").values():
        due = datetime.fromisoformat(flow_run["expected_start_time"])
        assert flow_run["state_name"] == "Scheduled" and flow_run["auto_scheduled"]
        assert (due.hour, due.minute, due.utcoffset()) == (3, 0, timedelta(0))
    assert server.flow_runs("pipeline") == {}


def test_the_form_of_the_ui_is_drawn_from_the_run_model(server):
    (deployment,) = (found for found in server.filter("deployments") if found["name"] == "pipeline")
    schema = deployment["parameter_openapi_schema"]
    assert deployment["enforce_parameter_schema"] and schema["required"] == ["run"]
    learning_rate = schema["definitions"]["TrainConfig"]["properties"]["lr"]
    assert learning_rate["description"] == "Peak learning rate." and learning_rate["exclusiveMinimum"] == 0


def test_a_changed_learning_rate_runs_only_training_and_what_follows(server, elsewhere, workspace):
    flow_run = server.start_run(elsewhere(train={"lr": 4.0e-3}) | {"name": "deployed"})
    wait_until(lambda: server.state(flow_run) in {"Completed", "Failed", "Crashed"}, 300)
    assert server.state(flow_run) == "Completed"

    def states() -> dict[str, str]:
        tasks = server.filter("task_runs", flow_runs={"id": {"any_": [flow_run]}})
        return {task["name"].rpartition("-")[0]: task["state_name"] for task in tasks}

    ran = ("preflight", "train", "select", "export", "verify_export", "publish")
    expected = {"convert": "Cached", "verify_convert": "Cached"} | dict.fromkeys(ran, "Completed")
    wait_until(lambda: states() == expected, 30)  # states travel as events
    keys = {artifact["key"]: artifact for artifact in server.filter("artifacts")}
    assert keys["train-deployed"]["type"] == "progress" and keys["train-deployed"]["data"] == 100.0
    assert "iteration 60 of 60, loss 0." in keys["train-deployed"]["description"]
    assert keys["report-deployed"]["type"] == "markdown" and "data:image/svg" in keys["report-deployed"]["data"]
    assert (workspace.store / "runs" / "deployed" / "model" / "config.json").exists()


def training_processes(store: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "mcore.train" in (process.info["cmdline"] or []) and str(store) in " ".join(process.info["cmdline"])
    ]


@pytest.mark.long
def test_a_cancelled_run_leaves_no_process_and_can_go_on(server, elsewhere, workspace):
    slow = elsewhere(train={"train_iters": 100_000, "save_steps": 50_000}) | {"name": "cancelled"}
    flow_run = server.start_run(slow)
    partial = workspace.store / ".partial"
    wait_until(lambda: any(partial.glob("train-*/metrics.jsonl")), 120)
    server.prefect("flow-run", "cancel", flow_run)
    wait_until(lambda: server.state(flow_run) == "Cancelled", 60)
    assert not training_processes(workspace.store)
    (folder,) = partial.glob("train-*")
    assert list(folder.glob("iter_*/metadata.json")), "training saves what it has when it is cancelled"
