"""Slurm's programs on one machine, for jobs that really run: `sbatch squeue sacct scontrol scancel srun`.

They speak as the real ones do in what the launcher reads: options, formats, exit statuses, states, and how signals
reach a job. Each node is a loopback address and a task of its own. State is a folder of files, named by FAKE_SLURM:

    jobs/<id>.json     the job; written by whoever changes it, under a lock
    calls.log          every call, a JSON list a line
    away               while it is there, the controller does not answer

A node fails, and a job is preempted, when a test writes so into the job's `ending`.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "srun")
LIVE = ("PENDING", "RUNNING", "COMPLETING")
KILL_WAIT_S = 5.0
REQUEUE_S = 1.5
"""Seconds that a job waits in the queue before it is started again; two minutes in Slurm."""
PR_SET_CHILD_SUBREAPER = 36
MINUTE_S = float(os.environ.get("FAKE_SLURM_MINUTE_S", "60"))


def install(folder: Path, state: Path) -> None:
    """Put the programs into a folder, for a PATH."""
    folder.mkdir(parents=True)
    (state / "jobs").mkdir(parents=True)
    for name in PROGRAMS:
        program = folder / name
        program.write_text(
            f"#!{sys.executable} -S\nimport sys\nsys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
            f"import fake_slurm\nsys.exit(fake_slurm.main({name!r}, sys.argv[1:]))\n"
        )
        program.chmod(0o755)


def home() -> Path:
    return Path(os.environ["FAKE_SLURM"])


@contextmanager
def job(number: str, state: Path | None = None) -> Iterator[dict]:
    """The job, to be read and changed; written back behind the block."""
    path = (state or home()) / "jobs" / f"{number}.json"
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = json.loads(path.read_text())
        yield content
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(content))
        temporary.rename(path)


def jobs() -> list[dict]:
    paths = sorted((home() / "jobs").glob("*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text()) for path in paths]


def known(number: str) -> dict | None:
    return next((one for one in jobs() if one["id"] == number), None)


def main(program: str, words: list[str]) -> int:
    with (home() / "calls.log").open("a") as log:
        log.write(json.dumps([program, *words]) + "\n")
    if program not in {"srun"} and (home() / "away").exists() and words[:2] != ["show", "hostnames"]:
        sys.stderr.write(f"{program}: error: Unable to contact slurm controller (connect failure)\n")
        return 1
    return globals()[program](words)


def options_of(words: list[str]) -> dict[str, str]:
    found = (re.fullmatch(r"--([a-z-]+)(?:=(.*))?", word) for word in words)
    return {match[1]: match[2] or "" for match in found if match}


def sbatch(words: list[str]) -> int:
    script = Path(words[-1])
    asked = options_of(re.findall(r"^#SBATCH (\S+)$", script.read_text(), re.MULTILINE))
    if asked.get("partition") == "nowhere":
        sys.stderr.write(
            "sbatch: error: invalid partition specified: nowhere\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
        )
        return 1
    number = str(max((int(one["id"]) for one in jobs()), default=4710) + 1)
    content = {
        "id": number, "name": asked["job-name"], "state": "PENDING", "reason": "Priority", "options": asked,
        "script": str(script), "restarts": 0, "exit": "0:0", "tasks": [], "batch": 0, "ending": "",
    }  # fmt: skip
    place = home() / "jobs" / f"{number}.json"
    place.with_suffix(".new").write_text(json.dumps(content))
    place.with_suffix(".new").rename(place)
    sys.stdout.write(f"{number}\n" if "--parsable" in words else f"Submitted batch job {number}\n")
    return 0


def squeue(words: list[str]) -> int:
    asked = options_of(words)
    if (number := asked.get("jobs")) is not None and known(number) is None:
        sys.stderr.write("slurm_load_jobs error: Invalid job id specified\n")
        return 1
    for one in jobs():
        chosen = one["id"] == number if number is not None else one["name"] == asked["name"]
        if chosen and one["state"] in LIVE:
            text = asked["format"].replace("%i", one["id"]).replace("%T", one["state"])
            sys.stdout.write(text.replace("%r", one["reason"]) + "\n")
    return 0


def sacct(words: list[str]) -> int:
    one = known(options_of(words)["jobs"])
    if one is not None:
        sys.stdout.write(f"{one['state']}|{one['exit']}\n")
    return 0


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        prefix, first, last = re.fullmatch(r"(.*)\[(\d+)-(\d+)\]", words[2]).groups()
        sys.stdout.writelines(f"{prefix}{number}\n" for number in range(int(first), int(last) + 1))
        return 0
    one = known(words[2])
    if one is None:
        sys.stderr.write("slurm_load_jobs error: Invalid job id specified\n")
        return 1
    sys.stdout.write(f"JobId={one['id']} JobName={one['name']} JobState={one['state']} ExitCode={one['exit']}\n")
    return 0


def scancel(words: list[str]) -> int:
    asked, number = options_of(words), words[-1]
    with job(number) as one:
        if one["state"] not in LIVE:
            sys.stderr.write(
                f"scancel: error: Kill job error on job id {number}: Job/step already completing or completed\n"
            )
            return 1
        if "signal" in asked:  # to the tasks, not to the script
            tell(one["tasks"], signal.SIGTERM)
            return 0
        one["ending"] = f"CANCELLED by {os.getuid()}"
        if one["state"] == "PENDING":
            one["state"] = one["ending"]
    return 0


def srun(words: list[str]) -> int:
    """A task on each node; the highest exit status of theirs, and all end if one ends badly."""
    number, nodes = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_JOB_NUM_NODES"])
    command = words[next(index for index, word in enumerate(words) if not word.startswith("--")) :]
    tasks = [
        subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)},
                         stdin=subprocess.DEVNULL, start_new_session=True)
        for node in range(nodes)
    ]  # fmt: skip
    with job(number) as one:
        one["tasks"] = [task.pid for task in tasks]
    signal.signal(signal.SIGTERM, lambda *_: tell([task.pid for task in tasks], signal.SIGTERM))
    bad_since = None
    while any(task.poll() is None for task in tasks):
        if bad_since is None and any(task.returncode for task in tasks):
            bad_since = time.monotonic()
        if bad_since is not None and time.monotonic() - bad_since > KILL_WAIT_S:
            for task in tasks:
                kill_tree(task.pid)
        time.sleep(0.05)
    return max(status if status >= 0 else 128 - status for status in (task.returncode for task in tasks))


def tell(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_tree(root: int) -> None:
    """Slurm's cgroup: whatever came of a task."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, IndexError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    tree = {root}
    while new := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= new
    tell(sorted(tree), signal.SIGKILL)


def run(number: str) -> None:
    """The controller's part: from the queue to the end of one job, with all its starts."""
    while True:
        with job(number) as one:
            mates = [other for other in jobs() if other["name"] == one["name"] and int(other["id"]) < int(number)]
            may_begin = not any(other["state"] in LIVE for other in mates) and not (home() / "full").exists()
            if one["state"] != "PENDING":
                return
            if may_begin:
                one |= {"state": "RUNNING", "reason": "None", "tasks": []}
            else:
                one["reason"] = "Dependency" if mates else "Resources"
        if not may_begin:
            time.sleep(0.1)
            continue
        if not run_once(number):
            return
        time.sleep(REQUEUE_S)


def run_once(number: str) -> bool:
    """One start; whether there is to be another."""
    one = known(number)
    asked = one["options"]
    nodes = int(asked["nodes"])
    environment = {
        **os.environ, "SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": f"127.0.0.[2-{nodes + 1}]",
    } | ({"SLURM_RESTART_COUNT": str(one["restarts"])} if one["restarts"] else {})  # fmt: skip
    with Path(asked["output"].replace("%j", number)).open("a") as log:
        script = subprocess.Popen(
            ["bash", one["script"]], env=environment, cwd=asked["chdir"], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    begin = time.monotonic()
    limit_s = float(asked["time"]) * MINUTE_S if "time" in asked else float("inf")
    warn_s = limit_s - float(asked["signal"].partition("@")[2]) if "signal" in asked else float("inf")
    warned = False
    while script.poll() is None:
        spent = time.monotonic() - begin
        ending = known(number)["ending"]
        if spent >= warn_s and not warned:
            tell(known(number)["tasks"], signal.SIGTERM)
            warned = True
        if spent >= limit_s:
            ending = "TIMEOUT"
        if ending:
            if ending != "NODE_FAIL":
                tell([script.pid, *known(number)["tasks"]], signal.SIGTERM)
                deadline = time.monotonic() + (KILL_WAIT_S if ending != "PREEMPTED" else 30.0)
                while script.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
            for pid in known(number)["tasks"]:
                kill_tree(pid)
            script.wait()
            with job(number) as one:
                one["ending"] = ""
                if ending in {"NODE_FAIL", "PREEMPTED"} and "requeue" in asked:
                    one |= {"state": "PENDING", "reason": "BeginTime", "restarts": one["restarts"] + 1}
                    return True
                one |= {"state": ending, "exit": "0:15"}
            return False
        time.sleep(0.05)
    with job(number) as one:
        status = script.returncode
        one["state"] = "COMPLETED" if status == 0 else "FAILED"
        one["exit"] = f"{status}:0" if status >= 0 else f"0:{-status}"
    return False


@contextmanager
def controller(state: Path, programs: Path, minute_s: float) -> Iterator[None]:
    """slurmctld: jobs are its children and nobody else's. Behind the block nothing of them runs."""
    environment = {**os.environ, "FAKE_SLURM": str(state), "FAKE_SLURM_MINUTE_S": str(minute_s)}
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    process = subprocess.Popen([sys.executable, "-S", __file__], env=environment, start_new_session=True)
    try:
        yield
    finally:
        kill_tree(process.pid)
        process.wait()


def serve() -> None:
    """Look after jobs, a thread each."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a script leaves behind stays with its job
    taken: set[str] = set()
    while True:
        for one in jobs():
            if one["id"] not in taken:
                taken.add(one["id"])
                threading.Thread(target=run, args=[one["id"]], daemon=True).start()
        time.sleep(0.05)


if __name__ == "__main__":
    serve()
