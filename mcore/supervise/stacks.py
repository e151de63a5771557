"""Where each process of a command stands, line by line, written down by py-spy before the command is ended."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mcore.supervise.processes import environment_of

WAIT_S = 30.0
"""Seconds that all stacks together may take."""


def write_stacks(pids: Iterable[int], folder: Path) -> list[Path]:
    """Write the stacks of all Python processes among these, a file each, `rank-1.txt` or `pid-4711.txt`.

    What can't be read says so in its file: a process that is no Python, or a kernel that forbids it.

    Returns:
        The files.
    """
    program = _py_spy()
    if program is None:
        return []
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
    folder.mkdir(parents=True)
    started = []
    for pid in sorted(pids):
        path = folder / _file_name(pid, folder)
        with path.open("w") as file:
            file.write(f"process {pid}: {_command_of(pid)}\n")
            file.flush()
            command = [program, "dump", "--pid", str(pid)]
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file))
    deadline = time.monotonic() + WAIT_S
    for process in started:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return sorted(folder.iterdir())


def _py_spy() -> str | None:
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def _file_name(pid: int, folder: Path) -> str:
    rank = environment_of(pid).get(b"RANK", b"").decode(errors="replace")
    name = f"rank-{rank}.txt" if rank.isdigit() else f"pid-{pid}.txt"
    return f"pid-{pid}.txt" if (folder / name).exists() else name


def _command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "ended"
