"""Training as a JobSet and as a PyTorchJob: created, attached to, deleted, failed. All is real but the cluster."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.clusters import fake_kubectl
from tests.clusters.runs import Cluster, held_up, kill, result_of, wait_until
from tests.flows.workspace import make_workspace

pytestmark = [
    pytest.mark.operations,
    pytest.mark.skipif(os.geteuid() != 0, reason="pods need a hosts file of their own, which takes root"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kubernetes")
    make_workspace(folder / "work")
    return folder


@pytest.fixture
def cluster(workspace, tmp_path) -> Cluster:
    """A cluster of the test's own."""
    state = tmp_path / "state"
    fake_kubectl.install(tmp_path / "bin", state)
    with fake_kubectl.cluster(state):
        yield Cluster(workspace / "work", tmp_path / "bin", state, {"FAKE_CLUSTER": str(state)})


@pytest.fixture(scope="module")
def undisturbed(workspace) -> bytes:
    """What two processes on this machine, without a scheduler, come to."""
    cluster = Cluster(workspace / "work", workspace, workspace, {})
    result_of(cluster.start("alone", nproc_per_node=2))
    return cluster.weights("alone")


def launch(cluster: Cluster, kind: str = "jobset") -> dict:
    settings = {
        "kind": kind, "image": "registry.example/mcore-flows:0.1.0", "python": sys.executable, "poll_s": 0.3,
        "volume_claim": "store", "mount_path": str(cluster.folder), "mem_per_node_gib": 4,
    }  # fmt: skip
    return {
        "launcher": "kubernetes", "nnodes": 2, "nproc_per_node": 1, "socket_ifname": "lo", "kubernetes": settings,
    }  # fmt: skip


def pods(cluster: Cluster) -> list[int]:
    (file,) = cluster.state.glob("*.pods")
    return json.loads(file.read_text())


@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
def test_an_object_trains_what_this_machine_would_and_the_next_flow_attaches(cluster, undisturbed, kind):
    flow = cluster.start(kind, **launch(cluster, kind))
    cluster.wait_for_iteration(kind, 60)
    with held_up(pods(cluster)):
        kill(flow)
        flow = cluster.start(kind, **launch(cluster, kind))
        wait_until(lambda: "attached to" in cluster.log(kind))
    result_of(flow)
    assert sum(words[2] == "create" for words in cluster.calls("kubectl")) == 1
    assert cluster.weights(kind) == undisturbed


def test_a_cancelled_flow_deletes_its_object_whose_pods_save_first(cluster, undisturbed):
    flow = cluster.start("cancelled", **launch(cluster))
    cluster.wait_for_iteration("cancelled", 70)
    flow.send_signal(signal.SIGTERM)
    flow.communicate(timeout=60)
    wait_until(lambda: not list((cluster.state / "objects").glob("*.json")))
    (tracker,) = (cluster.folder / "cancelled").glob(".partial/train-*/latest_checkpointed_iteration.txt")
    assert int(tracker.read_text()) >= 70
    result_of(cluster.start("cancelled", **launch(cluster)))
    assert cluster.weights("cancelled") == undisturbed


def test_a_pod_that_is_killed_is_told_by_the_digest_and_a_retry_goes_on(cluster, undisturbed):
    flow = cluster.start("killed", retries=1, **launch(cluster))
    cluster.wait_for_iteration("killed", 120)
    fake_kubectl.kill_tree(pods(cluster)[1])
    result_of(flow)
    log = cluster.log("killed")
    assert "machine 1" in log and "ended without a last word" in log
    assert "resuming behind iteration 100" in log
    assert cluster.weights("killed") == undisturbed


def test_an_object_that_somebody_deletes_is_not_made_again(cluster):
    flow = cluster.start("removed", retries=2, **launch(cluster))
    cluster.wait_for_iteration("removed", 30)
    (path,) = (cluster.state / "objects").glob("*.json")
    path.with_suffix(".deleted").touch()
    flow.communicate(timeout=100)
    assert flow.returncode != 0
    assert "cancelled by somebody else" in cluster.failure("removed")["message"]
    assert sum(words[2] == "create" for words in cluster.calls("kubectl")) == 1
