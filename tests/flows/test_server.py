"""Deployments on a real Prefect server: deployed, picked up by a process worker, run, shown, cancelled."""

import json
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from tests.flows.prefect_server import wait_until
from tests.flows.workspace import CHECKOUT

pytestmark = pytest.mark.server


def test_deployments_hold_no_path_of_this_machine(server):
    deployments = {deployment["name"]: deployment for deployment in server.filter("deployments")}
    ours = {"pipeline", "convert", "train", "evaluate", "nightly", "dataset-updated", "collect-garbage"}
    assert deployments.keys() == ours
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
    expected = dict.fromkeys(("prepare", "convert", "verify_convert"), "Cached") | dict.fromkeys(ran, "Completed")
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
