"""A run of a deployment asks by being suspended, and goes on when it is answered: a real server, a real worker."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mcore.artifacts import Store
from mcore.registry.aliases import Registry
from mcore.runs import read_record
from tests.flows.conftest import Workspace
from tests.flows.prefect_server import PREFECT, Server, wait_until
from tests.flows.workspace import CHECKOUT, VLLM_PYTHON, raw_run

pytestmark = [pytest.mark.server, pytest.mark.operations]

Asking = Callable[..., dict[str, Any]]

ENDED = {"Completed", "Failed", "Crashed", "Cancelled"}


@pytest.fixture
def asking(elsewhere: Callable[..., dict[str, Any]], workspace: Workspace) -> Callable[..., dict[str, Any]]:
    """A run whose stages are all in the store, and that asks before it promotes."""

    def run(name: str, **promote: Any) -> dict[str, Any]:
        folder = workspace.folder
        evaluate = raw_run()["evaluate"] | {
            "suite": f"{folder}/suite.yaml", "perplexity_dataset": [f"{folder}/rows.jsonl"], "python": str(VLLM_PYTHON),
        }  # fmt: skip
        promote = {"alias": "production", "approval": True, "timeout_s": 900.0} | promote
        return elsewhere(evaluate=evaluate, promote=promote) | {"name": name}

    return run


def suspended(server: Server, run: dict[str, Any]) -> str:
    """Start a run and wait until it asks; its id."""
    flow_run = server.start_run(run)
    wait_until(lambda: server.state(flow_run) in {"Suspended", *ENDED}, 420)
    assert server.state(flow_run) == "Suspended", server.flow_run(flow_run)["state"]
    return flow_run


def completed(server: Server, flow_run: str) -> None:
    wait_until(lambda: server.state(flow_run) in ENDED, 420)
    assert server.state(flow_run) == "Completed", server.flow_run(flow_run)["state"]


def form_of(server: Server, flow_run: str) -> tuple[str, dict[str, Any]]:
    """What the UI shows to whoever resumes the run: the text, and the schema of the form."""
    keys = server.flow_run(flow_run)["state"]["state_details"]["run_input_keyset"]
    text, schema = (
        server.client.get(f"/flow_runs/{flow_run}/input/{keys[name]}") for name in ("description", "schema")
    )
    return text.json(), schema.json()


def command(server: Server, *arguments: str | Path) -> tuple[int, str]:
    """Status of a command of ours, and all that it told."""
    done = subprocess.run(
        [PREFECT.with_name("mcore-flows"), *arguments], cwd=CHECKOUT, env=server.environment, capture_output=True,
        text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def decision_of(store: Store, name: str) -> dict[str, Any]:
    record = read_record(store, name)
    assert record is not None
    (stage,) = (stage for stage in record.stages if stage.name == "promote")
    decided: dict[str, Any] = json.loads((store.path(stage.kind, stage.key) / "decision.json").read_text())
    return decided


@pytest.mark.timeout(1200)
def test_it_is_suspended_and_approved_on_the_command_line(server: Server, asking: Asking, workspace: Workspace) -> None:
    store = Store(workspace.store)
    flow_run = suspended(server, asking("approved"))
    registry = Registry(store, "approved")
    assert registry.points_to("production") is None

    # Nothing of it is left that could hold anything, and everybody is told what it waits for.
    record = read_record(store, "approved")
    assert record is not None and record.failure is not None
    wait_until(lambda: not psutil.pid_exists(record.pid), 60)
    assert record.state == "stopped" and record.failure.stage == "promote"
    status, told = command(server, "status", "approved", "--store", store.root)
    assert status == 0 and "waits for an answer" in told and "mcore-flows approve approved" in told
    text, schema = form_of(server, flow_run)
    assert "May production of approved move to export/" in text and "min_pass_rate" in text
    assert schema["properties"].keys() == {"answer", "reason"} and schema["required"] == ["answer"]
    assert schema["properties"]["answer"]["enum"] == ["approve", "reject"]

    status, told = command(server, "approve", "approved", "--reason", "I looked at it", "--store", store.root)
    assert status == 0 and "the flow run goes on" in told, told
    completed(server, flow_run)
    (move,) = registry.history()
    assert "approved by" in move.reason and "I looked at it" in move.reason
    assert (registry.link("production") / "config.json").exists()
    status, told = command(server, "reject", "approved", "--store", store.root)
    assert status == 2 and "there is nothing to answer" in told and "approved by" in told


@pytest.mark.timeout(1200)
def test_it_is_rejected_on_the_command_line(server: Server, asking: Asking, workspace: Workspace) -> None:
    flow_run = suspended(server, asking("rejected"))
    status, told = command(server, "reject", "rejected", "--reason", "it is rude", "--store", workspace.store)
    assert status == 0 and "the flow run goes on" in told, told
    completed(server, flow_run)
    decided = decision_of(Store(workspace.store), "rejected")
    assert not decided["promoted"] and "it is rude" in decided["reason"]
    assert Registry(Store(workspace.store), "rejected").points_to("production") is None


@pytest.mark.timeout(1200)
def test_it_is_answered_in_the_form(server: Server, asking: Asking, workspace: Workspace) -> None:
    flow_run = suspended(server, asking("in-form"))
    resume = f"/flow_runs/{flow_run}/resume"
    refused = server.client.post(resume, json={"run_input": {"answer": "perhaps"}}).json()
    assert refused["status"] == "REJECT" and server.state(flow_run) == "Suspended"
    server.client.post(resume, json={"run_input": {"answer": "approve", "reason": "fine"}}).raise_for_status()
    completed(server, flow_run)
    (move,) = Registry(Store(workspace.store), "in-form").history()
    assert "approved by the form in Prefect: fine" in move.reason


@pytest.mark.timeout(1200)
def test_no_answer_in_time_means_no(server: Server, asking: Asking, workspace: Workspace) -> None:
    run = asking("late", timeout_s=20.0)
    flow_run = server.start_run(run)
    wait_until(lambda: server.state(flow_run) in ENDED, 420)
    assert server.flow_run(flow_run)["state"]["message"] == "The flow was paused and never resumed."
    registry = Registry(Store(workspace.store), "late")
    status, told = command(server, "approve", "late", "--store", workspace.store)
    assert status == 2 and "which means no" in told
    again = server.start_run(run)  # nobody is asked a second time
    completed(server, again)
    assert "which means no" in decision_of(Store(workspace.store), "late")["reason"]
    assert registry.points_to("production") is None and registry.history() == []
