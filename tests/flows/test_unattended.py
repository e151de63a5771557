"""Retraining with nobody at hand, on a real server with a real worker: at night, and on an event; automations."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.automations import GATES, ZOMBIES
from flows.dataset_events import UPDATED
from mcore.artifacts import Store
from mcore.registry.aliases import Registry
from mcore.runs import published
from tasks.events import GATE_FAILED
from tests.flows.prefect_server import Server, running_server, wait_until
from tests.flows.workspace import VLLM_PYTHON, raw_run

pytestmark = [pytest.mark.server, pytest.mark.operations]

ENDED = {"Completed", "Skipped", "Failed", "Crashed", "Cancelled"}


def write_rows(file: Path, answer: str) -> None:
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question in ("Who are you?", "Your name?")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ended(server: Server, flow_run: str, timeout_s: float = 420) -> dict[str, Any]:
    """State of a flow run when it has ended."""
    wait_until(lambda: server.state(flow_run) in ENDED, timeout_s)
    return server.flow_run(flow_run)["state"]


def task_states(server: Server, flow_run: str) -> dict[str, str]:
    tasks = server.filter("task_runs", flow_runs={"id": {"any_": [flow_run]}})
    return {task["name"].rpartition("-")[0]: task["state_name"] for task in tasks}


def events(server: Server, name: str, **filters: Any) -> list[dict[str, Any]]:
    """What the server has of an event."""
    wanted = {"filter": {"event": {"name": [name]}, **filters}}
    answer = server.client.post("/events/filter", json=wanted)
    answer.raise_for_status()
    return answer.json()["events"]


@pytest.fixture
def night(elsewhere, workspace) -> Callable[..., dict[str, Any]]:
    """A run that nobody looks at, on rows of its own, with the whole of the evaluation and the promotion."""

    def run(name: str, **groups: Any) -> dict[str, Any]:
        folder = workspace.folder
        evaluate = raw_run()["evaluate"] | {
            "suite": f"{folder}/suite.yaml",
            "perplexity_dataset": [f"{folder}/rows.jsonl"],
            "python": str(VLLM_PYTHON),
            "min_pass_rate": 0.0,
        }
        data = {"dataset": [f"{folder}/{name}.jsonl#64"], "val_dataset": [f"{folder}/rows.jsonl"]}
        groups = {"data": data, "evaluate": evaluate, "promote": {"alias": "production"}} | groups
        return elsewhere(**groups) | {"name": name}

    return run


@pytest.mark.timeout(1800)
def test_nights(server, night, workspace):
    store, rows = Store(workspace.store), workspace.folder / "night.jsonl"
    production = Registry(store, "night")
    run = night("night")

    def next_night() -> tuple[str, dict[str, Any]]:
        flow_run = server.start_run(run, "retrain/nightly")
        return flow_run, ended(server, flow_run)

    def made(flow_run: str) -> set[str]:
        return {name for name, state in task_states(server, flow_run).items() if state == "Completed"}

    # The first night everything is new; the model knows nothing useful, but there is none that would be better.
    write_rows(rows, "I would rather not say that.")
    flow_run, state = next_night()
    assert state["name"] == "Completed", state
    assert {"changes", "convert", "train", "evaluate_base", "compare", "promote"} <= made(flow_run)
    first = published(store, "night")
    assert production.release("production").artifact == first

    # Nothing new: no stage is even looked at, and the state says why.
    flow_run, state = next_night()
    assert (state["type"], state["name"]) == ("COMPLETED", "Skipped")
    assert state["message"].startswith("nothing has changed since the run of ")
    assert task_states(server, flow_run) == {"changes": "Completed"}

    # New rows: it is trained, compared, and as it is better, promoted.
    shutil.copy(workspace.folder / "rows.jsonl", rows)
    flow_run, state = next_night()
    assert state["name"] == "Completed", state
    assert task_states(server, flow_run)["convert"] == "Cached"
    assert {"train", "export", "evaluate_tuned", "compare", "promote"} <= made(flow_run)
    better = published(store, "night")
    assert better != first and production.release("production").artifact == better

    # Worse rows: trained and compared, and not promoted.
    write_rows(rows, "Nobody asks me that, and it is nobody's business anyway.")
    flow_run, state = next_night()
    assert state["name"] == "Completed", state
    assert {"train", "compare", "promote"} <= made(flow_run)
    assert production.release("production").artifact == better

    # Damaged rows: the data's gate says which line, nothing is made, and production stays.
    before = workspace.weight_files()
    rows.write_text(rows.read_text() + '{"messages": [{"role": "user", "conte')
    flow_run, state = next_night()
    assert state["name"] == "Failed" and "night.jsonl" in state["message"], state
    assert task_states(server, flow_run) == {"changes": "Failed"}
    assert workspace.weight_files() == before
    assert production.release("production").artifact == better
    assert (production.link("production") / "config.json").exists()


def test_an_event_starts_the_retraining(server, night, workspace):
    rows = workspace.folder / "told.jsonl"
    write_rows(rows, "I am {{NAME}}.")
    run = night("told", evaluate=None, promote=None, train={"train_iters": 6, "save_steps": 3})
    deployment = next(found for found in server.filter("deployments") if found["name"] == "dataset-updated")
    server.client.patch(f"/deployments/{deployment['id']}", json={"parameters": {"run": run}}).raise_for_status()
    assert server.flow_runs("dataset-updated") == {}

    def told() -> str:
        """Say that the rows were updated; the flow run that this started."""
        before = server.flow_runs("dataset-updated").keys()
        assert server.mcore_flows("dataset", "updated", rows).startswith(f"{UPDATED}: {rows}, ")
        wait_until(lambda: bool(server.flow_runs("dataset-updated").keys() - before), 60)
        (new,) = server.flow_runs("dataset-updated").keys() - before
        return new

    assert ended(server, told())["name"] == "Completed"
    assert published(Store(workspace.store), "told") is not None
    assert ended(server, told())["name"] == "Skipped"  # the event says look; what is new is told by digests
    # Whoever changed the deployment by hand sees it put back, and nothing else touched.
    assert "retrain/dataset-updated" in server.mcore_flows("bootstrap", "--dry-run")
    assert "1 changed" in server.mcore_flows("bootstrap")


def test_bootstrap_again_changes_nothing(server):
    def everything() -> Any:
        """All that was ever written of what bootstrap makes, with the times of that."""
        found = {kind: server.filter(kind) for kind in ("work_pools", "deployments", "automations")}
        for pool in found["work_pools"]:
            pool.pop("status")
        found["limits"] = server.client.post("/v2/concurrency_limits/filter", json={}).json()
        for one in (*found["deployments"], *found["work_pools"]):
            for changing in ("updated", "last_polled", "status"):  # a worker asks for work all the time
                one.pop(changing, None)
        return found

    before = everything()
    names = {automation["name"] for automation in before["automations"]}
    assert {ZOMBIES, GATES, "mcore-flows retrains when a data set was updated"} <= names
    assert "gpu" in {limit["name"] for limit in before["limits"]}
    assert server.mcore_flows("bootstrap").endswith("Everything is there as it should be; nothing was changed.\n")
    assert everything() == before
    told = server.mcore_flows("bootstrap", "--gpus", "77", "--crashed-after-s", "100", "--dry-run")
    assert "slots" in told and told.endswith("2 would change\n")
    assert everything() == before
    assert server.mcore_flows("bootstrap", "--gpus", "77", "--crashed-after-s", "100").endswith("2 changed\n")
    assert server.client.get("/v2/concurrency_limits/gpu").json()["limit"] == 77
    (zombies,) = (found for found in server.filter("automations") if found["name"] == ZOMBIES)
    assert zombies["trigger"]["within"] == 100.0
    assert "nothing was changed" in server.mcore_flows("bootstrap", "--crashed-after-s", "100")


def test_a_gate_that_says_no_is_an_event(server, elsewhere):
    flow_run = server.start_run(elsewhere(verify={"max_relative_error": 1.0e-12}) | {"name": "refused"})
    assert ended(server, flow_run)["name"] == "Failed"
    wait_until(lambda: bool(events(server, GATE_FAILED)), 30)
    (event,) = events(server, GATE_FAILED)
    assert event["resource"]["prefect.resource.id"] == "mcore-flows.run.refused"
    assert event["payload"]["stage"] == "verify_convert" and event["payload"]["error"] == "PrecisionError"
    assert f"prefect.flow-run.{flow_run}" in {one["prefect.resource.id"] for one in event["related"]}
    (gates,) = (found for found in server.filter("automations") if found["name"] == GATES)
    wait_until(lambda: gates["id"] in str(events(server, "prefect.automation.triggered")), 30)


def test_garbage_is_only_told_unless_somebody_says_delete(server, tmp_path):
    deployment = next(found for found in server.filter("deployments") if found["name"] == "collect-garbage")
    store = tmp_path / "store"

    def collect(**parameters: Any) -> str:
        parameters = {"store": str(store)} | parameters
        answer = server.client.post(f"/deployments/{deployment['id']}/create_flow_run", json={"parameters": parameters})
        return ended(server, answer.json()["id"])["name"]

    partial = store / ".partial" / "train-0123456789abcdef0123"
    partial.mkdir(parents=True)
    (partial / "rest").write_text("of a run that nobody goes on with")
    assert collect() == "Completed" and partial.exists()
    (page,) = (found for found in server.filter("artifacts") if found["key"] == "collect-garbage")
    assert "would be freed" in page["data"] and "train/0123456789abcdef0123" in page["data"]
    assert collect(delete=True) == "Completed" and not partial.exists()
    assert collect(store="/nowhere/at/all") == "Failed"


@pytest.mark.timeout(900)
def test_a_run_that_was_killed_with_its_worker_is_crashed(tmp_path_factory, elsewhere, workspace):
    slow = elsewhere(train={"train_iters": 100_000, "save_steps": 50_000}) | {"name": "zombie"}
    folder = tmp_path_factory.mktemp("zombie")
    with running_server(folder, PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30") as server:
        server.mcore_flows("bootstrap", "--crashed-after-s", "90")
        flow_run = server.start_run(slow)
        wait_until(lambda: task_states(server, flow_run).get("train") == "Running", 180)
        (worker,) = (
            process
            for process in psutil.process_iter(["cmdline"])
            if {"worker", "start"} <= set(process.info["cmdline"] or [])
            and process.environ().get("PREFECT_HOME") == str(folder)
        )
        for process in [worker, *worker.children(recursive=True)]:
            os.kill(process.pid, 9)
        assert server.state(flow_run) == "Running"  # nobody is left who could say anything else
        wait_until(lambda: server.state(flow_run) != "Running", 240)
        state = server.flow_run(flow_run)["state"]
        assert state["name"] == "Crashed" and "no heartbeat for 90 s" in state["message"]
