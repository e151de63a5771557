"""The machine: what supervision needs of the kernel, GPUs and who holds them, limits, and how processes talk."""

from __future__ import annotations

import locale
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flows.doctor.finding import Finding, judged
from mcore import launch
from mcore.devices import Device, Request, holders, installed_gpus, visible
from mcore.environment import torch_cuda
from mcore.errors import PipelineError
from mcore.supervise.stacks import write_stacks
from tasks.preflight.devices import host_memory
from tasks.preflight.loopback import loopback_problems
from tasks.preflight.versions import driver_problems

MIN_FILES = 4096
MIN_SHARED_GB = 1.0
SHARED = Path("/dev/shm")
ORPHAN = """
import ctypes, os, signal, time
ready, go = os.pipe()
child = os.fork()
if child == 0:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    os.write(go, b"x")
    for number in range(3):
        os.close(number)
    time.sleep(30)
    os._exit(0)
os.read(ready, 1)
print(child)
"""
"""A parent that ends before its child, which has asked for a SIGKILL then (PR_SET_PDEATHSIG)."""
LEAVES_A_CHILD = "setsid sleep 300 >/dev/null 2>&1 & echo $! > pid"


def machine_findings(locks: Path) -> Iterator[Finding]:
    """What holds for this machine.

    Args:
        locks: Folder in which devices are leased (`launch.device_locks`).
    """
    yield from _supervision()
    yield from _device_findings(locks)
    yield from _limits()
    encoding = locale.getpreferredencoding(False).upper().replace("-", "")
    names = f"{sys.getfilesystemencoding()}, {locale.getpreferredencoding(False)}"
    fix = "Set LC_ALL=C.UTF-8 where commands are started."
    yield judged("locale", sys.getfilesystemencoding() == "utf-8" and encoding == "UTF8", names, fix)
    year = time.gmtime().tm_year
    yield judged("clock", year >= 2024, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "Set the clock (NTP).")


def _supervision() -> Iterator[Finding]:
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        pid_file = Path(folder) / "pid"
        fix = "Stages' processes may outlive a cancel here: use Linux 3.4 or newer, and no sandbox that forbids prctl."
        try:
            command = ["sh", "-c", LEAVES_A_CHILD]
            launch.run(command, log_path=Path(folder) / "log", error_file=Path(folder) / "error.json", cwd=Path(folder))
            left = _lives(pid_file.read_text().strip())
            found = "a process that left its session was " + ("left behind" if left else "found and ended")
        except (PipelineError, OSError) as exc:
            left, found = True, str(exc).splitlines()[0]
        yield judged("subreaper", not left, found, fix)
        orphan = subprocess.run([sys.executable, "-S", "-c", ORPHAN], capture_output=True, text=True).stdout.strip()
        time.sleep(0.2)  # for the kernel to carry it out
        left = not orphan or _lives(orphan)
        found = "a child outlived its parent" if left else "a child ended with its parent"
        yield judged("parent-death signal", not left, found, fix)
        yield _stacks(Path(folder) / "stacks")


def _lives(pid: str) -> bool:
    """Whether a process is there and has not ended; who ended and was not waited for is there all the same."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def _stacks(folder: Path) -> Finding:
    fix = "Install py-spy, and allow ptrace (a container needs --cap-add SYS_PTRACE): else a stall tells no stacks."
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as child:
        time.sleep(0.3)  # for an interpreter to be up
        try:
            files = write_stacks({child.pid}, folder)
            text = "".join(Path(file).read_text() for file in files)
        except OSError as exc:
            text = str(exc)
        finally:
            child.kill()
    works = "<module>" in text
    last = (text.strip().splitlines() or ["nothing was written"])[-1]
    return judged("py-spy", works, "reads the stacks of a child" if works else last, fix, otherwise="warn")


def _device_findings(locks: Path) -> Iterator[Finding]:
    gpus = visible(installed_gpus())
    if not gpus:
        yield Finding("GPUs", "ok", f"none; {len(os.sched_getaffinity(0))} cores, {host_memory() / 2**30:.1f} GiB")
    held = holders(locks, [Device(gpu.index, gpu.uuid, True) for gpu in gpus])
    for gpu in gpus:
        used = gpu.total_gib - gpu.free_gib
        who = f"held by {held[gpu.index].get('holder')}" if gpu.index in held else "free"
        found = f"{gpu.name}, {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free, driver {gpu.driver}, {who}"
        stray = gpu.index not in held and used > 0.1 * gpu.total_gib
        fix = "Somebody uses it without a lease, so stages pass it by: nvidia-smi tells who."
        yield judged(f"GPU {gpu.index}", not stray, found, fix, otherwise="warn")
    for problem in driver_problems(gpus, torch_cuda(), "torch"):
        yield Finding(problem.subject, "fail", f"{problem.found}, needs {problem.expected}", problem.fix)
    notes: list[str] = []
    count = max(2, len(gpus)) if len(gpus) != 1 else 1
    request = Request(count, locks, "mcore-flows doctor")
    problems = loopback_problems(request, notes.append)
    text = notes[0] if notes else f"{count} processes added up numbers" if count > 1 else "one process"
    for problem in problems:
        yield Finding(problem.subject, "fail", problem.found, problem.fix)
    if not problems:
        yield judged("NCCL" if gpus else "gloo", not notes, text, "Look again when they are free.", otherwise="warn")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"ulimit -n {MIN_FILES} (hard limit {hard}): data loaders and NCCL open many."
    yield judged("open files", soft >= MIN_FILES or soft == resource.RLIM_INFINITY, str(soft), fix, otherwise="warn")
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    many = processes == resource.RLIM_INFINITY or processes >= MIN_FILES
    found = "unlimited" if processes == resource.RLIM_INFINITY else str(processes)
    yield judged("processes", many, found, f"ulimit -u {MIN_FILES}.", otherwise="warn")
    try:
        shared_gb = shutil.disk_usage(SHARED).free / 1e9
    except OSError as exc:
        yield Finding(str(SHARED), "fail", exc.strerror or str(exc), "Mount it (tmpfs): processes share memory there.")
        return
    fix = "Processes of a training share memory there: docker run --shm-size=8g or --ipc=host."
    yield judged(str(SHARED), shared_gb >= MIN_SHARED_GB, f"{shared_gb:.1f} GB free", fix, otherwise="warn")
