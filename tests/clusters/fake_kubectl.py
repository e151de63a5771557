"""kubectl and a cluster on one machine, for JobSets and PyTorchJobs whose pods really run.

It speaks as the real one does in what the launcher reads: `create`, `get -o json`, `delete`, their exit statuses and
errors, labels, conditions, and what pods find in their environment. Pods are processes; those of a JobSet find each
other by the names of its headless service, which are in a hosts file of their own. State is a folder, FAKE_CLUSTER:

    objects/<name>.json    the object as it was created, with its status
    calls.log              every call, a JSON list a line
    unschedulable          while it is there, pods wait
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.clusters.fake_slurm import kill_tree, tell

KINDS = {"JobSet": "jobsets.jobset.x-k8s.io", "PyTorchJob": "pytorchjobs.kubeflow.org"}
MASTER_PORT = 23456


def install(folder: Path, state: Path) -> None:
    """Put kubectl into a folder, for a PATH."""
    folder.mkdir(parents=True)
    (state / "objects").mkdir(parents=True)
    program = folder / "kubectl"
    checkout = Path(__file__).parents[2]
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[:0] = [{str(checkout)!r}]\n"
        "from tests.clusters import fake_kubectl\nsys.exit(fake_kubectl.main(sys.argv[1:]))\n"
    )
    program.chmod(0o755)


def home() -> Path:
    return Path(os.environ["FAKE_CLUSTER"])


def place(name: str) -> Path:
    return home() / "objects" / f"{name}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    temporary.write_text(json.dumps(content))
    temporary.rename(path)


def main(words: list[str]) -> int:
    with (home() / "calls.log").open("a") as log:
        log.write(json.dumps(["kubectl", *words]) + "\n")
    options = [word for word in words if word.startswith("--")]
    verb, *rest = [word for word in words if not word.startswith("--")]
    assert "--namespace=default" in options, words
    if verb == "create":
        return create(Path(rest[1]))
    resource, _, name = rest[0].partition("/")
    if not place(name).exists():
        if "--ignore-not-found" in options:
            return 0
        sys.stderr.write(f'Error from server (NotFound): {resource} "{name}" not found\n')
        return 1
    if verb == "get":
        sys.stdout.write(place(name).read_text())
    else:
        assert verb == "delete" and "--cascade=foreground" in options, words
        (home() / "objects" / f"{name}.deleted").touch()
    return 0


def create(file: Path) -> int:
    content = yaml.safe_load(file.read_text())
    name, resource = content["metadata"]["name"], KINDS[content["kind"]]
    if place(name).exists():
        sys.stderr.write(
            f'Error from server (AlreadyExists): error when creating "{file}": {resource} "{name}" already exists\n'
        )
        return 1
    write(place(name), content | {"status": {}})
    sys.stdout.write(f"{resource.replace('s.', '.', 1)}/{name} created\n")
    return 0


def pods_of(content: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """The pods of an object: specification, and what the cluster adds to the environment."""
    if content["kind"] == "JobSet":
        (group,) = content["spec"]["replicatedJobs"]
        job = group["template"]["spec"]
        assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
        return [(job["template"]["spec"], {"JOB_COMPLETION_INDEX": str(index)}) for index in range(job["completions"])]
    replicas = content["spec"]["pytorchReplicaSpecs"]
    specs = [
        one["template"]["spec"]
        for role in ("Master", "Worker")
        if (one := replicas.get(role))
        for _ in range(one["replicas"])
    ]
    assert all(spec["containers"][0]["name"] == "pytorch" for spec in specs)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(MASTER_PORT), "WORLD_SIZE": str(len(specs))}
    return [(spec, address | {"RANK": str(rank)}) for rank, spec in enumerate(specs)]


def start(spec: dict[str, Any], added: dict[str, str], hosts: Path | None) -> subprocess.Popen:
    (container,) = spec["containers"]
    given = {one["name"]: one["value"] for one in container["env"]}
    command = container["command"]
    if hosts is not None:
        inner = 'mount --bind "$0" /etc/hosts && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", inner, str(hosts), *command]
    return subprocess.Popen(
        command, env={**os.environ, **given, **added}, cwd=container["workingDir"], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def condition(content: dict[str, Any], name: str, message: str = "") -> None:
    one = {"type": name, "status": "True", "reason": name, "message": message}
    content["status"].setdefault("conditions", []).append(one)
    write(place(content["metadata"]["name"]), content)


def run(name: str) -> None:
    """From the object to its end, or its deletion."""
    content = json.loads(place(name).read_text())
    deleted = place(name).with_suffix(".deleted")
    is_set = content["kind"] == "JobSet"
    while (home() / "unschedulable").exists() and not deleted.exists():
        time.sleep(0.05)
    hosts = None
    if is_set:
        service = content["spec"]["network"]["subdomain"]
        hosts = home() / f"{name}.hosts"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.0.1 {name}-node-0-0.{service} {name}-node-0-0\n")
    pods = [] if deleted.exists() else [start(spec, added, hosts) for spec, added in pods_of(content)]
    grace_s = pods_of(content)[0][0]["terminationGracePeriodSeconds"]
    (home() / f"{name}.pods").write_text(json.dumps([pod.pid for pod in pods]))
    if is_set:
        content["status"]["replicatedJobsStatus"] = [{"name": "node", "active": len(pods)}]
        write(place(name), content)
    else:
        condition(content, "Running")
    while not deleted.exists():
        statuses = [pod.poll() for pod in pods]
        if any(statuses) or all(status == 0 for status in statuses):
            good = not any(statuses)
            content["status"].pop("replicatedJobsStatus", None)
            for one in content["status"].get("conditions", []):
                one["status"] = "False"
            if not good:
                for pod in pods:
                    kill_tree(pod.pid)
            names = ("Completed", "Failed") if is_set else ("Succeeded", "Failed")
            condition(content, names[not good], "" if good else "jobset failed due to one or more job failures")
            break
        time.sleep(0.05)
    while not deleted.exists():
        time.sleep(0.05)
    tell([pod.pid for pod in pods if pod.poll() is None], signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any(pod.poll() is None for pod in pods) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pod in pods:
        if pod.poll() is None:
            kill_tree(pod.pid)
    place(name).unlink()
    deleted.unlink()


@contextmanager
def cluster(state: Path) -> Iterator[None]:
    """The control plane and its nodes. Behind the block nothing of them runs."""
    environment = {**os.environ, "FAKE_CLUSTER": str(state), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, __file__], env=environment, start_new_session=True)
    try:
        yield
    finally:
        kill_tree(process.pid)
        process.wait()


def serve() -> None:
    threads: dict[str, threading.Thread] = {}
    while True:
        for path in (home() / "objects").glob("*.json"):
            if path.stem not in threads or not threads[path.stem].is_alive():
                threads[path.stem] = threading.Thread(target=run, args=[path.stem], daemon=True)
                threads[path.stem].start()
        time.sleep(0.05)


if __name__ == "__main__":
    serve()
