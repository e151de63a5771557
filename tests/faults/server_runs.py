"""Runs that a worker or `serve` starts, for tests that disturb these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults.disturbed import wait_until
from tests.flows.prefect_server import Server
from tests.flows.workspace import raw_run

RUN = raw_run(
    evaluate=None,
    train={"train_iters": 80, "save_steps": 20, "eval_steps": 80, "lr_warmup_iters": 5},
    launch={"retries": 1, "grace_s": 5.0},
)
ENDED = {"Completed", "Failed", "Crashed", "Cancelled"}


def absolute(workspace: Path, run: dict[str, Any], name: str) -> dict[str, Any]:
    """A run of a name whose paths are those of a workspace wherever it is started; its store is there too."""
    data = {"dataset": [f"{workspace}/rows.jsonl#64"], "val_dataset": [f"{workspace}/rows.jsonl"]}
    whole = run | {
        "name": name, "model": {"source": str(workspace / "model")}, "data": run["data"] | data,
        "launch": run["launch"] | {"store": str(workspace / name)},
    }  # fmt: skip
    if run["evaluate"] is not None:
        files = {"suite": f"{workspace}/suite.yaml", "perplexity_dataset": [f"{workspace}/rows.jsonl"]}
        whole["evaluate"] = run["evaluate"] | files
    return whole


def state_once_ended(server: Server, flow_run: str, timeout_s: float = 300) -> str:
    """Name of a flow run's last state."""
    wait_until(lambda: server.state(flow_run) in ENDED, "the flow run does not end", timeout_s)
    return server.state(flow_run)
