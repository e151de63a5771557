"""Training as a job of Slurm: submitted, attached to, cancelled, requeued, lost. All is real but Slurm itself."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.clusters import fake_slurm
from tests.clusters.runs import Cluster, held_up, kill, result_of, wait_until
from tests.flows.workspace import make_workspace

pytestmark = pytest.mark.operations

SLURM = {"launcher": "slurm", "nnodes": 2, "nproc_per_node": 1, "socket_ifname": "lo", "slurm": {"poll_s": 0.3}}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    make_workspace(folder / "work")
    return folder


@pytest.fixture
def cluster(workspace, tmp_path) -> Cluster:
    """A Slurm of the test's own; whatever of its jobs still runs is killed behind it."""
    state = tmp_path / "state"
    fake_slurm.install(tmp_path / "bin", state)
    with fake_slurm.controller(state, tmp_path / "bin", minute_s=12):
        yield Cluster(workspace / "work", tmp_path / "bin", state, {"FAKE_SLURM": str(state)})


def change(cluster: Cluster, number: str, **changes: object) -> None:
    with fake_slurm.job(number, cluster.state) as one:
        one.update(changes)


def job(cluster: Cluster, number: str) -> dict:
    return json.loads((cluster.state / "jobs" / f"{number}.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(workspace) -> bytes:
    """What two processes on this machine, without a scheduler, come to."""
    cluster = Cluster(workspace / "work", workspace, workspace, {})
    result_of(cluster.start("alone", nproc_per_node=2))
    return cluster.weights("alone")


def test_a_job_trains_what_this_machine_would(cluster, undisturbed):
    flow = cluster.start("plain", **SLURM)
    cluster.wait_for_iteration("plain", 30)
    (cluster.state / "away").touch()  # the controller is restarted, say
    time.sleep(2)
    (cluster.state / "away").unlink()
    result_of(flow)
    assert cluster.weights("plain") == undisturbed
    assert len(cluster.calls("sbatch")) == 1
    log = cluster.log("plain")
    assert "submitted Slurm job 4711" in log and "job: running" in log
    assert job(cluster, "4711")["state"] == "COMPLETED"


def test_kill_9_of_the_flow_leaves_the_job_and_the_next_flow_attaches(cluster, undisturbed):
    flow = cluster.start("attached", **SLURM)
    cluster.wait_for_iteration("attached", 60)
    with held_up(job(cluster, "4711")["tasks"]):
        kill(flow)
        flow = cluster.start("attached", **SLURM)
        wait_until(lambda: "attached to" in cluster.log("attached"))
    result_of(flow)
    assert len(cluster.calls("sbatch")) == 1
    assert "attached to Slurm job 4711" in cluster.log("attached")
    assert cluster.weights("attached") == undisturbed


def test_a_job_whose_number_was_not_written_down_is_found_by_its_name(cluster, undisturbed):
    flow = cluster.start("unwritten", **SLURM)
    cluster.wait_for_iteration("unwritten", 60)
    with held_up(job(cluster, "4711")["tasks"]):
        kill(flow)
        (started,) = (cluster.folder / "unwritten").glob(".jobs/*/started.json")
        started.unlink()  # as if the flow had been killed right behind sbatch
        flow = cluster.start("unwritten", **SLURM)
        wait_until(lambda: "attached to" in cluster.log("unwritten"))
    result_of(flow)
    assert len(cluster.calls("sbatch")) == 1
    assert cluster.weights("unwritten") == undisturbed


def test_a_cancelled_flow_ends_its_job_which_saves_and_the_next_goes_on(cluster, undisturbed):
    flow = cluster.start("cancelled", **SLURM)
    cluster.wait_for_iteration("cancelled", 70)
    flow.send_signal(signal.SIGTERM)
    flow.communicate(timeout=60)
    wait_until(lambda: job(cluster, "4711")["state"] not in fake_slurm.LIVE)
    assert (job(cluster, "4711")["state"], job(cluster, "4711")["exit"]) == ("FAILED", "75:0")
    assert ["scancel", "--signal=TERM", "4711"] in cluster.calls("scancel")
    (tracker,) = (cluster.folder / "cancelled").glob(".partial/train-*/latest_checkpointed_iteration.txt")
    assert int(tracker.read_text()) >= 70
    result_of(cluster.start("cancelled", **SLURM))
    assert len(cluster.calls("sbatch")) == 2
    assert cluster.weights("cancelled") == undisturbed


def test_a_job_that_waits_in_the_queue_is_taken_back(cluster):
    (cluster.state / "full").touch()
    flow = cluster.start("queued", **SLURM)
    wait_until(lambda: (cluster.state / "jobs" / "4711.json").exists() and cluster.calls("squeue")[2:], 200)
    flow.send_signal(signal.SIGTERM)
    flow.communicate(timeout=60)
    wait_until(lambda: job(cluster, "4711")["state"].startswith("CANCELLED"))
    assert "job: waiting (Resources)" in cluster.log("queued")


def test_a_preempted_job_is_requeued_under_its_number_and_resumes(cluster, undisturbed):
    flow = cluster.start("preempted", **SLURM)
    cluster.wait_for_iteration("preempted", 70)
    change(cluster, "4711", ending="PREEMPTED")
    result_of(flow)
    assert job(cluster, "4711")["restarts"] == 1
    assert len(cluster.calls("sbatch")) == 1
    log = cluster.log("preempted")
    assert "job: waiting (BeginTime)" in log and "resuming behind iteration" in log
    assert cluster.weights("preempted") == undisturbed


def test_at_its_time_limit_it_saves_and_a_further_job_goes_on(cluster, undisturbed):
    settings = SLURM | {"slurm": {"poll_s": 0.3, "time_limit_minutes": 2}, "grace_s": 6.0}
    result_of(cluster.start("limited", **settings))
    states = [job(cluster, str(4711 + number)) for number in range(len(cluster.calls("sbatch")))]
    assert len(states) >= 2 and {one["exit"] for one in states[:-1]} == {"75:0"} and states[-1]["state"] == "COMPLETED"
    assert cluster.weights("limited") == undisturbed


def test_a_node_that_fails_is_told_by_the_digest_and_a_retry_goes_on(cluster, undisturbed):
    settings = SLURM | {"slurm": {"poll_s": 0.3, "requeue": False}}
    flow = cluster.start("failed", **settings)
    cluster.wait_for_iteration("failed", 120)
    change(cluster, "4711", ending="NODE_FAIL")
    flow.communicate(timeout=100)
    assert flow.returncode != 0
    failure = cluster.failure("failed")
    assert failure["kind"] == "transient" and "NODE_FAIL" in failure["message"], failure
    result_of(cluster.start("failed", **settings))
    assert "resuming behind iteration 100" in cluster.log("failed")
    assert cluster.weights("failed") == undisturbed


def test_a_job_that_somebody_else_cancels_is_not_submitted_again(cluster):
    flow = cluster.start("removed", retries=2, **SLURM)
    cluster.wait_for_iteration("removed", 30)
    change(cluster, "4711", ending="CANCELLED by 1000")
    flow.communicate(timeout=100)
    assert flow.returncode != 0
    assert len(cluster.calls("sbatch")) == 1
    assert "cancelled by somebody else" in cluster.failure("removed")["message"]


def test_what_slurm_refuses_is_told(cluster):
    flow = cluster.start("refused", **(SLURM | {"slurm": {"partition": "nowhere"}}))
    flow.communicate(timeout=100)
    assert flow.returncode != 0
    assert "Invalid partition name specified" in cluster.failure("refused")["message"]
