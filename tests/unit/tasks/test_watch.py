"""A flow run that is cancelled or deleted on the server, while nobody signals its process, as behind a new worker."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelling

from mcore.supervise.processes import ProcessId
from tests.unit.tasks import toy_flow

CODE = "write('pid', str(os.getpid()))\ntime.sleep(600)"


@pytest.mark.parametrize("ending", ["cancelled", pytest.param("deleted", marks=pytest.mark.faults)])
def test_its_stage_is_ended_and_nothing_is_left(tmp_path: Path, prefect_api_url: str, ending: str) -> None:
    store = tmp_path / "store"
    (store / ".partial").mkdir(parents=True)
    with get_client(sync_client=True) as client:
        before = {run.id for run in client.read_flow_runs(limit=200)}
        process = subprocess.Popen(
            [sys.executable, toy_flow.__file__, str(store), CODE],
            env={**os.environ, "PREFECT_API_URL": prefect_api_url},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        note = store / ".partial" / "toy-0123456789abcdef0123" / "pid"
        deadline = time.monotonic() + 60
        while not (note.exists() and note.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        child = ProcessId.of(int(note.read_text()))
        (flow_run,) = (run for run in client.read_flow_runs(limit=200) if run.id not in before)
        if ending == "cancelled":
            client.set_flow_run_state(flow_run.id, Cancelling(), force=True)
        else:
            client.delete_flow_run(flow_run.id)
        _, err = process.communicate(timeout=90)
        assert process.returncode != 0 and not child.is_alive(), err
        assert not (store / "toy").exists() and "started again" not in err
        if ending == "cancelled":
            state = client.read_flow_run(flow_run.id).state
            assert state is not None and state.type == StateType.CANCELLED, err
