"""What a scheduler is handed: a batch script, an object. And what a machine makes of the orders."""

import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.schema.cluster import KubernetesConfig, SlurmConfig
from mcore.errors import ConfigError
from mcore.launchers.kubernetes import manifest, state_of
from mcore.launchers.node import Place, address_towards, place_of, torchrun_words, why_unreachable
from mcore.launchers.orders import Orders, Started, forget_started, job_folder, read_orders, read_started
from mcore.launchers.slurm import PHASES, _state, render_script

SLURM = SlurmConfig(partition="gpu", account="lab", time_limit_minutes=60, gpus_per_node=8, mem_per_node_gib=100)
KUBERNETES: dict[str, Any] = {"image": "r/i:1", "volume_claim": "store", "mount_path": "/store"}


@pytest.fixture
def orders() -> Orders:
    return Orders(
        folder=Path("/store/.jobs/train-k"), name="mcore-flows-0123", launcher="slurm", nnodes=2, nproc_per_node=8,
        python="/opt/it's/python", command=("-m", "mcore.train", "/store/run.yaml"), cwd="/work", grace_s=120.0,
        stall_timeout_s=None, progress=(Path("/store/metrics.jsonl"),), done_file=Path("/store/metrics.json"),
        join_timeout_s=600.0, slurm=SLURM,
    )  # fmt: skip


def test_orders_survive_the_file(orders, tmp_path):
    orders = replace(orders, folder=tmp_path, kubernetes=KubernetesConfig(**KUBERNETES))
    orders.write()
    assert read_orders(orders.path) == orders
    (tmp_path / "orders.json").write_text('{"name": 1}')
    with pytest.raises(ConfigError, match="no orders"):
        read_orders(orders.path)


def test_what_was_started_is_kept_until_it_is_forgotten(tmp_path):
    assert read_started(tmp_path) is None
    Started("4711", "4711").write(tmp_path)
    assert read_started(tmp_path) == Started("4711", "4711")
    forget_started(tmp_path)
    forget_started(tmp_path)
    assert read_started(tmp_path) is None


def test_a_job_belongs_to_what_it_makes():
    assert job_folder(Path("/store/.partial/train-k")) == Path("/store/.jobs/train-k")


def test_the_batch_script_says_what_was_asked_for_and_nothing_else(orders):
    script = render_script(orders)
    asked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert asked == [
        "--job-name=mcore-flows-0123", "--dependency=singleton", "--nodes=2", "--ntasks-per-node=1", "--chdir=/work",
        "--output=/store/.jobs/train-k/slurm-%j.log", "--open-mode=append", "--requeue", "--time=60",
        "--signal=TERM@120", "--partition=gpu", "--account=lab", "--gpus-per-node=8", "--mem=100G",
    ]  # fmt: skip
    bare = render_script(replace(orders, slurm=SlurmConfig(requeue=False)))
    assert "--no-requeue" in bare and not any(word in bare for word in ("--time", "--signal", "--partition", "None"))


def test_the_shell_reads_the_script_as_the_words_that_were_meant(orders, tmp_path):
    """Run by bash, with an srun that says what it was called with."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(render_script(orders))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-5:] == [
        "/opt/it's/python", "-m", "mcore.launchers", "node", "/store/.jobs/train-k/orders.json",
    ]  # fmt: skip
    assert said.stderr == ""


@pytest.mark.parametrize("folder", ["/store/a b", "/store/$(touch x)", "/store/a\n#SBATCH --uid=0", "store/relative"])
def test_a_path_that_a_script_would_read_otherwise_is_refused(orders, folder):
    with pytest.raises(ConfigError, match="can't be written"):
        render_script(replace(orders, folder=Path(folder)))


@pytest.mark.parametrize(
    ("name", "exit_code", "phase", "status"),
    [
        ("COMPLETED", "0:0", "done", 0),
        ("FAILED", "1:0", "failed", 1),
        ("FAILED", "75:0", "stopped", 75),
        ("FAILED", "0:9", "failed", 137),
        ("TIMEOUT", "0:15", "stopped", 143),
        ("CANCELLED by 1000", "0:15", "cancelled", 143),
        ("NODE_FAIL", "1:0", "lost", 1),
        ("PREEMPTED", "0:15", "lost", 143),
        ("OUT_OF_MEMORY", "0:125", "out_of_memory", 253),
        ("RUNNING", "0:0", "running", 0),
    ],
)
def test_states_of_slurm(name, exit_code, phase, status):
    state = _state(name, exit_code)
    assert state is not None and (state.phase, state.status) == (phase, status)


def test_a_state_that_slurm_will_invent_is_none_of_ours():
    assert _state("ENTANGLED", "0:0") is None and _state("", "") is None
    assert len(PHASES) > 20


def test_a_jobset_is_what_was_asked_for(orders):
    settings = KubernetesConfig(
        **KUBERNETES, gpus_per_node=8, cpus_per_node=16, mem_per_node_gib=64, queue="night", namespace="lab",
        node_selector={"gpu": "h100"},
    )  # fmt: skip
    made = manifest(replace(orders, launcher="kubernetes", python="python", kubernetes=settings), "abc")
    assert yaml.safe_load(yaml.safe_dump(made)) == made
    assert (made["kind"], made["metadata"]["name"], made["metadata"]["namespace"]) == (
        "JobSet",
        "mcore-flows-0123",
        "lab",
    )
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "night"
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 2, 0)
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120 and pod["nodeSelector"] == {"gpu": "h100"}
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "mcore.launchers", "node", "/store/.jobs/train-k/orders.json"]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "8"}
    assert container["resources"]["requests"]["cpu"] == "16"


def test_a_pytorchjob_has_a_master_and_the_rest_are_workers(orders):
    settings = KubernetesConfig(**KUBERNETES, kind="pytorchjob")
    orders = replace(orders, launcher="kubernetes", kubernetes=settings)
    replicas = manifest(orders, "abc")["spec"]["pytorchReplicaSpecs"]
    assert {role: one["replicas"] for role, one in replicas.items()} == {"Master": 1, "Worker": 1}
    assert set(manifest(replace(orders, nnodes=1), "abc")["spec"]["pytorchReplicaSpecs"]) == {"Master"}


@pytest.mark.parametrize(
    ("status", "phase"),
    [
        ({}, "waiting"),
        ({"replicatedJobsStatus": [{"name": "node", "active": 0, "ready": 0}]}, "waiting"),
        ({"replicatedJobsStatus": [{"name": "node", "active": 1}]}, "running"),
        ({"conditions": [{"type": "Suspended", "status": "True", "message": "queued"}]}, "waiting"),
        ({"conditions": [{"type": "Created", "status": "True"}]}, "waiting"),
        ({"conditions": [{"type": "Running", "status": "True"}]}, "running"),
        ({"conditions": [{"type": "Running", "status": "False"}, {"type": "Succeeded", "status": "True"}]}, "done"),
        ({"conditions": [{"type": "Completed", "status": "True"}]}, "done"),
        ({"conditions": [{"type": "Failed", "status": "True", "reason": "r", "message": "m"}]}, "failed"),
    ],
)
def test_states_of_kubernetes(status, phase):
    assert state_of({"status": status}).phase == phase


def test_a_machine_finds_its_place(orders, tmp_path, monkeypatch):
    by_hand = replace(orders, launcher="local", rdzv_endpoint="h:1")
    assert place_of(by_hand, {}, rank=1, start="s") == Place(1, "h:1", "s")
    jobset = replace(orders, launcher="kubernetes", kubernetes=KubernetesConfig(**KUBERNETES))
    environment = {"JOB_COMPLETION_INDEX": "1", "MCORE_FLOWS_START": "s"}
    endpoint = "mcore-flows-0123-node-0-0.mcore-flows-0123:29400"
    assert place_of(jobset, environment) == Place(1, endpoint, "s")
    operator = replace(orders, launcher="kubernetes", kubernetes=KubernetesConfig(**KUBERNETES, kind="pytorchjob"))
    environment = {"RANK": "0", "MASTER_ADDR": "m", "MASTER_PORT": "23456", "MCORE_FLOWS_START": "s"}
    assert place_of(operator, environment) == Place(0, "m:23456", "s")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/bash\n[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment = {"SLURM_JOB_ID": "14711", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NODEID": "1"}
    assert place_of(orders, environment) == Place(1, "n7:24711", "14711.0")
    assert place_of(orders, environment | {"SLURM_RESTART_COUNT": "2"}).start == "14711.2"


@pytest.mark.parametrize("rank", [None, 2])
def test_a_machine_without_a_place_is_refused(orders, rank):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        place_of(replace(orders, launcher="local", rdzv_endpoint="h:1"), {}, rank=rank, start="s")


def test_torchrun_is_told_who_the_first_machine_is(orders):
    words = torchrun_words(orders, Place(0, "h:1", "s"), local_addr="10.0.0.1")
    assert "--rdzv-conf=is_host=true,join_timeout=600,read_timeout=60" in words
    assert "--rdzv-id=mcore-flows-0123.s" in words and "--local-addr=10.0.0.1" in words
    words = torchrun_words(replace(orders, stall_timeout_s=40.0), Place(1, "h:1", "s"), local_addr=None)
    assert "--rdzv-conf=is_host=false,join_timeout=600,read_timeout=60" in words


def test_the_address_for_others_is_that_of_the_interface():
    assert address_towards("127.0.0.2:1", None) == "127.0.0.1" or address_towards("127.0.0.2:1", None) == "127.0.0.2"
    assert address_towards("localhost:1", None) is None, "no other machine finds this one by that"
    assert address_towards("10.0.0.1:1", "lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"one of .*lo"):
        address_towards("10.0.0.1:1", "no_such0")


def test_a_host_that_refuses_is_reached_and_one_that_is_nowhere_is_not():
    assert why_unreachable("127.0.0.1:1") == ""
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert why_unreachable(f"127.0.0.1:{server.getsockname()[1]}") == ""
    assert why_unreachable("no-such-host.invalid:1")
