"""Kubernetes: one JobSet, or one PyTorchJob, of `launch.nnodes` pods. Only kubectl is used.

The object is created, never applied: the cluster lets one of its name exist, so whoever comes second attaches to it.
Its name is made of the key of what it makes. It is not restarted by the cluster; the flow that watches it does that, as
it tells what is worth it.
"""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

from configs.schema.cluster import KubernetesConfig
from mcore.errors import ConfigError, LaunchError, Problem
from mcore.folders import write_durably
from mcore.launchers.node import START_VARIABLE
from mcore.launchers.orders import Orders
from mcore.launchers.programs import Answer, ask
from mcore.launchers.protocol import JobState
from mcore.supervise.record import read_record

MANIFEST = "job.yaml"
START = "mcore-flows/start"
"""Label with the start that the output lies under."""
DELETE_WAIT_S = 120.0
RESOURCES = {"jobset": "jobsets.jobset.x-k8s.io", "pytorchjob": "pytorchjobs.kubeflow.org"}


def manifest(orders: Orders, start: str) -> dict[str, Any]:
    """The object that is created for one start of a job.

    Raises:
        ConfigError: The orders have nothing for Kubernetes.
    """
    settings = orders.kubernetes
    if settings is None:
        raise ConfigError("there is nothing to make", [Problem("launch.kubernetes", "settings", "none")])
    labels = {"app.kubernetes.io/managed-by": "mcore-flows", START: start}
    if settings.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = settings.queue
    metadata = {"name": orders.name, "namespace": settings.namespace, "labels": labels}
    pod = {"metadata": {"labels": labels}, "spec": _pod(orders, settings, start)}
    if settings.kind == "pytorchjob":
        replicas = {"Master": 1, "Worker": orders.nnodes - 1}
        return {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": metadata,
            "spec": {
                "runPolicy": {"backoffLimit": 0, "cleanPodPolicy": "None"},
                "pytorchReplicaSpecs": {
                    role: {"replicas": number, "restartPolicy": "Never", "template": pod}
                    for role, number in replicas.items()
                    if number
                },
            },
        }
    job = {
        "parallelism": orders.nnodes,
        "completions": orders.nnodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": pod,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": 0},
            "network": {"enableDNSHostnames": True, "subdomain": orders.name},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(orders: Orders, settings: KubernetesConfig, start: str) -> dict[str, Any]:
    amounts = {
        "cpu": settings.cpus_per_node,
        "memory": settings.mem_per_node_gib and f"{settings.mem_per_node_gib}Gi",
        "nvidia.com/gpu": settings.gpus_per_node,
    }
    requests = {name: str(value) for name, value in amounts.items() if value is not None}
    limits = {name: value for name, value in requests.items() if name != "cpu"}
    container = {
        "name": "pytorch",  # the training operator looks for this name
        "image": settings.image,
        "command": [settings.python, "-m", "mcore.launchers", "node", str(orders.path)],
        "workingDir": orders.cwd,
        "env": [{"name": START_VARIABLE, "value": start}],
        "resources": {"requests": requests, "limits": limits},
        "volumeMounts": [
            {"name": "store", "mountPath": settings.mount_path},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": round(orders.grace_s),
        **({"serviceAccountName": settings.service_account} if settings.service_account else {}),
        **({"nodeSelector": dict(settings.node_selector)} if settings.node_selector else {}),
        "containers": [container],
        "volumes": [
            {"name": "store", "persistentVolumeClaim": {"claimName": settings.volume_claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{settings.shm_gib}Gi"}},
        ],
    }


class KubernetesLauncher:
    """The object of some orders.

    Args:
        orders: What it is to do.
    """

    outlives_flow = True

    def __init__(self, orders: Orders) -> None:
        assert orders.kubernetes is not None
        self._orders = orders
        self._settings = orders.kubernetes
        self.poll_s = self._settings.poll_s
        self._object = f"{RESOURCES[self._settings.kind]}/{orders.name}"
        self._start = uuid.uuid4().hex[:8]
        self._last = JobState("waiting")

    def _kubectl(self, *words: str) -> Answer:
        context = [f"--context={self._settings.context}"] if self._settings.context else []
        return ask(["kubectl", *context, f"--namespace={self._settings.namespace}", *words])

    def start_or_attach(self) -> str:
        found = self._get()
        if found is not None and (state := state_of(found)).has_ended:
            if state.phase == "done" and self._orders.done_file.exists():
                self._attach(found)
                return f"{self._object} had ended meanwhile"
            self._delete()
            found = None
        if found is not None:
            self._attach(found)
            return f"attached to {self._object}"
        file = self._orders.folder / MANIFEST
        write_durably(file, yaml.safe_dump(manifest(self._orders, self._start), sort_keys=False))
        answer = self._kubectl("create", "-f", str(file))
        if answer.status != 0 and "AlreadyExists" not in answer.err:
            raise LaunchError(f"kubectl refused {file}: {answer.words}", returncode=answer.status)
        if answer.status != 0 and (found := self._get()) is not None:  # another flow was faster
            self._attach(found)
            return f"attached to {self._object}"
        return f"created {self._object}"

    def _attach(self, found: dict[str, Any]) -> None:
        self._start = found["metadata"].get("labels", {}).get(START, self._start)

    def _get(self) -> dict[str, Any] | None:
        """The object; None if there is none.

        Raises:
            LaunchError: The cluster does not answer.
        """
        answer = self._kubectl("get", self._object, "--output=json")
        if answer.status == 0:
            found: dict[str, Any] = json.loads(answer.out)
            return found
        if "NotFound" in answer.err:
            return None
        raise LaunchError(f"kubectl: {answer.words}", returncode=answer.status)

    def _delete(self) -> None:
        """Delete the object, and wait until its pods are gone.

        Raises:
            LaunchError: They are not, after two minutes.
        """
        self._kubectl("delete", self._object, "--cascade=foreground", "--wait=false", "--ignore-not-found")
        deadline = time.monotonic() + DELETE_WAIT_S + self._orders.grace_s
        while self._get() is not None:
            if time.monotonic() > deadline:
                raise LaunchError(f"{self._object} is still there after it was deleted")
            time.sleep(min(1.0, self.poll_s))

    def poll(self) -> JobState:
        try:
            found = self._get()
        except LaunchError:
            return self._last
        if found is None:
            return JobState("cancelled", f"{self._object} was deleted")
        self._last = state_of(found)
        if self._last.phase == "failed" and (silent := self._silent()):
            return JobState("lost", f"{silent} ended without a last word; {self._last.reason}")
        return self._last

    def _silent(self) -> str:
        """Machines whose supervisors did not write how they ended: evicted, out of memory, or their node was lost."""
        folder, found = self._orders.start_folder(self._start), []
        for rank in range(self._orders.nnodes):
            record = read_record(folder / f"node-{rank}.json")
            found += [f"machine {rank} ({record.host})"] if record is not None and record.status is None else []
        return ", ".join(found)

    def ask_to_end(self) -> None:
        # Pods get SIGTERM and the grace; the object is there until they are gone.
        self._kubectl("delete", self._object, "--cascade=foreground", "--wait=false", "--ignore-not-found")

    def end(self) -> None:
        self._kubectl(
            "delete", self._object, "--cascade=foreground", "--wait=false", "--ignore-not-found", "--grace-period=0",
            "--force",
        )  # fmt: skip

    def logs(self) -> list[Path]:
        return sorted(self._orders.start_folder(self._start).glob("node-*.log"))

    def folder(self) -> Path | None:
        return self._orders.start_folder(self._start)


def state_of(found: dict[str, Any]) -> JobState:
    """Where a JobSet or a PyTorchJob stands, by its conditions."""
    conditions = {one["type"]: one for one in found.get("status", {}).get("conditions", []) if one["status"] == "True"}
    for name in ("Completed", "Succeeded"):
        if name in conditions:
            return JobState("done", status=0)
    if (failed := conditions.get("Failed")) is not None:
        return JobState("failed", f"{failed.get('reason', '')}: {failed.get('message', '')}".strip(": "))
    if (suspended := conditions.get("Suspended")) is not None:
        return JobState("waiting", suspended.get("message", ""))
    jobs = found.get("status", {}).get("replicatedJobsStatus", [])
    is_running = "Running" in conditions or any(one.get("active", 0) or one.get("ready", 0) for one in jobs)
    return JobState("running" if is_running else "waiting")
