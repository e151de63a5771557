"""A run over two hosts: one is cut off while it trains, and the run goes on when it is back, with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.disturbed import BASE, exported_weights, result_of, wait_for_iteration
from tests.faults.two_hosts import IFNAME, may_make_hosts, two_hosts
from tests.flows import run_pipeline
from tests.flows.workspace import make_workspace, raw_run

NO_HOSTS = pytest.mark.skipif(not may_make_hosts(), reason="this user may make no network namespaces")
pytestmark = [pytest.mark.operations, NO_HOSTS]

ITERATIONS = 300
STALL_S = 40.0
TRAIN = {"train_iters": ITERATIONS, "save_steps": 50, "eval_steps": ITERATIONS, "save_total_limit": 2}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    make_workspace(folder)
    return folder


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as pair:
        yield pair


@contextmanager
def run_over(hosts, folder: Path, store: str, port: int, *, retries: int):
    """The flow on the first host and `mcore-flows node` on the second."""
    launch = {
        "nnodes": 2, "nproc_per_node": 1, "rdzv_endpoint": f"{hosts.addresses[0]}:{port}", "socket_ifname": IFNAME,
        "join_timeout_s": 120.0, "stall_timeout_s": STALL_S, "grace_s": 10.0, "retries": retries,
        "retry_delay_s": 0.1, "timeout_s": 400.0, "store": store,
    }  # fmt: skip
    run = raw_run(evaluate=None, train=TRAIN) | {"launch": launch}
    run_file = folder / f"{store}.json"
    run_file.write_text(json.dumps(run))
    environment = {**os.environ, "PREFECT_HOME": str(folder / f"prefect-{store}"), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    options = {"cwd": folder, "env": environment, "text": True, "start_new_session": True}
    member = [sys.executable, "-m", "flows.cli", "node", run_file.name, "--node-rank", "1"]
    with (folder / f"{store}-node.log").open("w") as log:
        other = subprocess.Popen(hosts.command(1, *member), stdout=log, stderr=log, **options)
        flow = subprocess.Popen(
            hosts.command(0, sys.executable, run_pipeline.__file__, run_file.name),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
        )  # fmt: skip
        try:
            yield flow, other
        finally:
            for process in (flow, other):
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.communicate(timeout=60)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(workspace, hosts) -> bytes:
    with run_over(hosts, workspace, "undisturbed", 29511, retries=0) as (flow, other):
        result_of(flow)
        assert other.wait(timeout=60) == 0, "the other host is to see that the work is complete"
    return exported_weights(workspace, "undisturbed")


def test_both_hosts_train_and_one_of_them_tokenises(workspace, undisturbed):
    (job,) = (workspace / "undisturbed" / ".jobs").iterdir()
    (start,) = job.glob("start-*")
    logs = {path.name: path.read_text() for path in start.glob("node-*.log")}
    assert set(logs) == {"node-0.log", "node-1.log"}
    assert all(json.loads((start / f"node-{rank}.json").read_text())["status"] == 0 for rank in (0, 1))


def test_a_host_that_is_cut_off_ends_the_run_in_time_and_it_goes_on_when_the_host_is_back(
    workspace, hosts, undisturbed
):
    store = workspace / "cut"
    with run_over(hosts, workspace, "cut", 29512, retries=0) as (flow, _):
        wait_for_iteration(store, 120)
        hosts.cut_off(1)
        try:
            cut_s = time.monotonic()
            flow.communicate(timeout=STALL_S + 60)
            took_s = time.monotonic() - cut_s
        finally:
            hosts.back(1)
        assert flow.returncode != 0
        assert took_s < STALL_S + 30
        failure = json.loads((store / "runs" / "tiny" / "train" / "failure.json").read_text())
        assert failure["kind"] == "transient", failure
        assert "machine 1" in failure["message"], failure["message"]
    with run_over(hosts, workspace, "cut", 29512, retries=0) as (flow, _):
        result = result_of(flow)
    assert {outcome["name"] for outcome in result["outcomes"] if outcome["cached"]} == BASE
    log = (store / "runs" / "tiny" / "train" / "stage.log").read_text()
    assert "resuming behind iteration 100" in log
    assert exported_weights(workspace, "cut") == undisturbed


def test_a_retry_waits_for_the_host_and_goes_on_by_itself(workspace, hosts, undisturbed):
    store = workspace / "again"
    with run_over(hosts, workspace, "again", 29513, retries=1) as (flow, other):
        wait_for_iteration(store, 120)
        hosts.cut_off(1)
        try:
            deadline = time.monotonic() + STALL_S + 60
            while len(list(store.glob(".jobs/*/start-*"))) < 2:
                assert time.monotonic() < deadline and flow.poll() is None
                time.sleep(0.2)
        finally:
            hosts.back(1)
        result_of(flow)
        assert other.wait(timeout=60) == 0
    assert exported_weights(workspace, "again") == undisturbed
