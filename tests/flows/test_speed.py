"""What the pipeline itself costs: a stage beside its child, and a run of which everything is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from tests.flows import run_pipeline
from tests.flows.workspace import raw_run

pytestmark = pytest.mark.long

OVERHEAD_S = 1.5
AGAIN_S = 12.0


def test_a_stage_takes_little_more_than_its_child(workspace, finished):
    runs = workspace.store / "runs" / "tiny"
    outcomes = json.loads((runs / "run.json").read_text())["outcomes"]
    beside = {}
    for name, outcome in outcomes.items():
        try:
            process = json.loads((runs / name / "process.json").read_text())
        except FileNotFoundError:
            assert name == "select"  # it needs no child
            beside[name] = outcome["seconds"]
            continue
        assert process["cause"] == "exited" and process["status"] == 0
        beside[name] = outcome["seconds"] - (process["heartbeat"] - process["started"])
    assert len(beside) == 10 and max(beside.values()) < OVERHEAD_S, beside


def test_a_finished_run_is_gone_through_again_in_seconds(workspace, finished, prefect_api_url):
    run_file = workspace.folder / "again.json"
    run_file.write_text(json.dumps(raw_run()))
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, run_pipeline.__file__, run_file.name],
        cwd=workspace.folder, env=os.environ | {"PREFECT_API_URL": prefect_api_url}, capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    came_to = json.loads(done.stdout)
    assert all(outcome["cached"] for outcome in came_to["outcomes"]) and came_to["torch"] is False
    assert seconds < AGAIN_S
