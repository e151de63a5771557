"""Trainings on one machine and one server that want the same devices, by real deployment runs of a real worker."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcore.launch import RECORD
from mcore.supervise.record import read_record
from tests.flows.prefect_server import Server, wait_until
from tests.flows.workspace import make_workspace, raw_run

pytestmark = [pytest.mark.server, pytest.mark.long]

HOLD = """
import sys, time
from pathlib import Path
from mcore.devices import Request
from tasks.devices import deployment_slots
say = lambda line: print(line, flush=True)
request = Request(int(sys.argv[1]), Path(sys.argv[2]), "test", None, 8)
with deployment_slots(request, say, lambda: None):
    time.sleep(float(sys.argv[3]))
"""


def active_slots(server: Server) -> int:
    answer = server.client.get("/v2/concurrency_limits/gpu")
    answer.raise_for_status()
    return answer.json()["active_slots"]


def limit_to(server: Server, number: int) -> None:
    server.client.patch("/v2/concurrency_limits/gpu", json={"limit": number}).raise_for_status()


def test_two_trainings_of_two_processes_on_two_slots_run_one_after_the_other(server: Server, tmp_path: Path) -> None:
    make_workspace(tmp_path)
    limit_to(server, 4)  # the server would let both run; it is the machine that has two slots
    files = {"dataset": [f"{tmp_path}/rows.jsonl#64"], "val_dataset": [f"{tmp_path}/rows.jsonl"]}
    launch = {"store": str(tmp_path / "store"), "device_slots": 2, "device_locks": str(tmp_path / "locks")}
    ids = []
    for name, lr in (("one", 5.0e-3), ("two", 4.0e-3)):
        run = raw_run(
            model={"source": str(tmp_path / "model")}, data=files, evaluate=None, launch=launch, train={"lr": lr}
        )
        ids.append(server.start_run(run | {"name": name}))
    most = 0

    def both_ended() -> bool:
        nonlocal most
        most = max(most, active_slots(server))
        return all(server.state(flow_run) in {"Completed", "Failed", "Crashed"} for flow_run in ids)

    wait_until(both_ended, 420)
    assert [server.state(flow_run) for flow_run in ids] == ["Completed", "Completed"]
    records = [read_record(tmp_path / "store" / "runs" / name / "train" / RECORD) for name in ("one", "two")]
    first, second = sorted(records, key=lambda record: record.started)
    assert first.heartbeat <= second.started, "the first had ended when the second began"
    logs = [(tmp_path / "store" / "runs" / name / "train" / "stage.log").read_text() for name in ("one", "two")]
    assert all("[supervisor] on slot 0, slot 1" in log for log in logs)
    assert sum("waiting for 2 devices: slot 0 is held by run" in log for log in logs) == 1
    assert most == 4 and active_slots(server) == 0


def test_slots_of_the_server_are_waited_for_and_come_back(server: Server, tmp_path: Path) -> None:
    limit_to(server, 3)
    run_id = server.start_run(raw_run(model={"source": str(tmp_path / "none")}))  # any flow run, as a holder
    environment = server.environment | {
        "PREFECT__RUNTIME__DEPLOYMENT__ID": "00000000-0000-0000-0000-000000000001",
        "PREFECT__RUNTIME__FLOW_RUN__ID": run_id,
    }

    def hold(count: int, seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(count), str(tmp_path / "locks"), str(seconds)]
        return subprocess.Popen(
            command, env=environment, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    first = hold(2, 12.0)
    assert first.stdout.readline() == "holds 2 slots of the server's limit gpu\n"
    assert active_slots(server) == 2
    second = hold(2, 0.1)
    told, _ = second.communicate(timeout=120)
    assert told.splitlines() == [
        "waiting for 2 of 3 slots of the server's limit gpu: 2 are taken",
        "holds 2 slots of the server's limit gpu",
    ]
    assert first.wait(30) == 0 and active_slots(server) == 0
    never = hold(4, 0.1)
    _, error = never.communicate(timeout=60)
    assert never.returncode == 1 and "limit gpu of the Prefect server: expected at least 4, found 3" in error
    # A run that is none of a deployment takes nothing, whatever the server has.
    environment = {**os.environ, **server.environment}
    told, _ = hold(4, 0.1).communicate(timeout=60)
    assert told == ""


def test_the_doctor_finds_server_worker_and_limit(server: Server, tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("mcore-flows"), "doctor", "--json", "--store", tmp_path / "store"],
        env=server.environment, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["areas"]["Prefect"]}
    assert found["server"]["state"] == "ok" and "Prefect 3." in found["server"]["found"]
    assert found["work pool mcore-flows"]["found"] == "process, 1 worker online"
    assert "slots taken" in found["limit gpu"]["found"] and found["deployments"]["state"] == "ok"
    assert found["leases of the server"]["state"] == "warn", "a plain server keeps them in memory"
    assert found["address of the server"] == {
        "subject": "address of the server", "state": "ok", "found": "127.0.0.1", "fix": ""
    }  # fmt: skip
