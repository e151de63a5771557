"""Processes of this machine by the kernel's word: who descends from whom, and whether one still is who it was."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int | ctypes.c_ulong) -> None:
    """Ask the kernel for something about this process; what a kernel does not know it leaves."""
    _libc.prctl(option, value, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process, never mistaken for a later one that got its number.

    Attributes:
        machine: The boot and the process namespace that the number counts in.
        pid: Its number.
        start_ticks: When it started, in the kernel's ticks since boot.
    """

    machine: str
    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The process that has the number now.

        Raises:
            ProcessLookupError: Nobody has.
        """
        fields = _stat(pid)
        if fields is None:
            raise ProcessLookupError(pid)
        return cls(this_machine(), pid, int(fields[_START]))

    @property
    def is_here(self) -> bool:
        """Whether it counts among the processes of this machine, so that its life can be asked for."""
        return self.machine == this_machine()

    def is_alive(self) -> bool:
        """Whether it runs; only to be asked of processes of this machine."""
        fields = _stat(self.pid)
        return fields is not None and int(fields[_START]) == self.start_ticks and fields[_STATE] not in "ZX"


_STATE, _PPID, _START = 0, 1, 19
"""Places in `/proc/PID/stat` behind the name: state, parent, start time."""


def _stat(pid: int) -> list[str] | None:
    try:
        # "pid (name) state ppid …", and a name may hold anything, brackets and blanks too.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None  # it ended
    return fields if len(fields) > _START else None


@cache
def this_machine() -> str:
    """A name for this boot of this machine, and for the process namespace in which we count."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"


def all_pids() -> list[int]:
    """Numbers of all processes that can be seen."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def descendants(root: int) -> set[int]:
    """Process ids of all children, their children and so on."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        if (fields := _stat(pid)) is not None:
            children.setdefault(int(fields[_PPID]), []).append(pid)
    found: set[int] = set()
    waiting = [root]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found.add(pid)
            waiting.append(pid)
    return found


def environment_of(pid: int) -> dict[bytes, bytes]:
    """What a process was started with; nothing of another user's, or of one that ended."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Signal each of them that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
