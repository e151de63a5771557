"""A small process around one command, so that the command's whole process tree ends when it must.

    python -I mcore/supervise.py --parent PID --grace-s 20 [--lock FILE] -- COMMAND …

torchrun and vLLM give their workers sessions of their own, so killing a process group is not enough: workers outlive it
and hold memory, devices and half-written files. The supervisor is a subreaper: whatever its command starts, and however
often that forks, becomes its descendant and stays so. It ends the tree when it gets SIGTERM, when its parent is gone,
or when the command itself has ended and left something behind.

First the command alone is asked to end (SIGTERM): it knows best how to tell its own processes, and a training process
that saves must not lose the helpers it saves with. After the grace, everything that is left is asked, then killed. The
grace is the supervisor's own: a parent that is killed early does not cut short a process that is saving.

The lock is held as long as the tree lives, so a new run that wants the same output folder waits for it, also if the run
before was killed. Only the standard library is imported, so that a start costs a few milliseconds.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05
LEFTOVER_GRACE_S = 2.0
"""Seconds for the processes that a command leaves behind, between SIGTERM and SIGKILL."""
KILL_WAIT_S = 5.0
"""Seconds for killed processes to vanish; one in an uninterruptible system call may take longer."""
EXIT_NOT_FOUND = 127

_libc = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """Runs one command and ends everything that came of it."""

    def __init__(self, parent: int, grace_s: float) -> None:
        self._parent = parent
        self._grace_s = grace_s
        self._asked_to_stop = False
        self._command = -1
        self._status: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked_to_stop = True

    @property
    def must_stop(self) -> bool:
        """Whether somebody asked for the end, or there is nobody left to work for."""
        return self._asked_to_stop or os.getppid() != self._parent

    def wait_for_lock(self, path: Path) -> int | None:
        """The descriptor that holds the lock; None if the end came first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        told = False
        while not self.must_stop:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if not told:
                    _say("waiting for the processes of an earlier run to end")
                    told = True
                time.sleep(POLL_S)
        os.close(descriptor)
        return None

    def run(self, command: list[str]) -> int:
        """Run the command to its end, or end it.

        Returns:
            Its exit status, or 128 plus the signal that ended it.
        """
        try:
            # Bound to a name: an unreferenced Popen would collect the exit status itself.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_follow_parent
            )
        except OSError as exc:
            _say(f"{command[0]} can't be started: {exc.strerror}")
            return EXIT_NOT_FOUND
        self._command = process.pid
        while self._reap() and self._status is None and not self.must_stop:
            time.sleep(POLL_S)
        if self._status is None:
            _say("asking the command to end")
            _send(signal.SIGTERM, {self._command})
            deadline = time.monotonic() + self._grace_s
            while self._reap() and self._status is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
        for number, wait_s in ((signal.SIGTERM, LEFTOVER_GRACE_S), (signal.SIGKILL, KILL_WAIT_S)):
            self._end_descendants(number, wait_s)
        status = self._status if self._status is not None else -signal.SIGKILL
        return status if status >= 0 else 128 - status

    def _end_descendants(self, number: signal.Signals, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        reached: set[int] = set()
        while self._reap() and time.monotonic() < deadline:
            new = descendants(os.getpid()) - reached
            if new:
                _say(f"{number.name} to {len(new)} processes: {sorted(new)}")
                _send(number, new)
                reached |= new
            time.sleep(POLL_S)

    def _reap(self) -> bool:
        """Collect what has ended, the command's own status among it; False if no descendant is left.

        The kernel's word, free of races: orphans become children of this process, so no children, no descendants.
        """
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._command:
                    self._status = os.waitstatus_to_exitcode(ended[1])
        except ChildProcessError:
            return False
        return True


def _follow_parent() -> None:
    # The last net: if the supervisor itself is killed, its command at least is asked to end.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def descendants(root: int) -> set[int]:
    """Process ids of all children, their children and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # "pid (name) state ppid …", and a name may hold anything, brackets and blanks too.
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue  # it ended meanwhile
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    waiting = [root]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found.add(pid)
            waiting.append(pid)
    return found


def _send(number: signal.Signals, pids: set[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _say(text: str) -> None:
    sys.stderr.write(f"[supervisor] {text}\n")
    sys.stderr.flush()


def main() -> int:
    """Read the options, take the lock, run the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--grace-s", type=float, required=True)
    parser.add_argument("--lock", type=Path)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    supervisor = Supervisor(options.parent, options.grace_s)
    lock = supervisor.wait_for_lock(options.lock) if options.lock else None
    if supervisor.must_stop:
        return 128 + signal.SIGTERM
    try:
        return supervisor.run(options.command)
    finally:
        if lock is not None:
            os.close(lock)


if __name__ == "__main__":
    sys.exit(main())
