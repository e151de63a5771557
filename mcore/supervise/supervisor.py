"""Runs one command and ends everything that came of it.

The tree is ended when the supervisor gets SIGTERM, when nobody is left to work for (`duty.py`), when a limit is over,
or when the command itself has ended and left something behind. First the command alone is asked to end (SIGTERM): it
knows best how to tell its own processes, and a training process that saves must not lose the helpers it saves with.
After the grace, everything that is left is asked, then killed. The grace is the supervisor's own: a parent that is
killed early does not cut short a process that is saving.

As long as the tree lives it is seen in the lease that it works under, so a new run that wants the same output folder
takes it over or waits for its end, also if the run before was killed. If another machine has the lease meanwhile, the
tree is killed at once: what it would still save is another's to write.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from mcore.devices import DeviceLease, Request
from mcore.redact import redact_file
from mcore.supervise.duty import Duty, LeaseOrders
from mcore.supervise.limits import Limits
from mcore.supervise.oom import oom_kills
from mcore.supervise.processes import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    ProcessId,
    descendants,
    prctl,
    send,
)
from mcore.supervise.record import HEARTBEAT_S, Cause, Record
from mcore.supervise.stacks import write_stacks

POLL_S = 0.05
LEFTOVER_GRACE_S = 2.0
"""Seconds for the processes that a command leaves behind, between SIGTERM and SIGKILL."""
KILL_WAIT_S = 5.0
"""Seconds for killed processes to vanish; one in an uninterruptible system call may take longer."""
STALLED_GRACE_S = 10.0
"""Seconds, at most, for a command that stands still: it will hardly save any more."""
EXIT_NOT_WRITTEN = 1
EXIT_NOT_FOUND = 127


@dataclass(frozen=True, slots=True)
class Orders:
    """What a supervisor has to do.

    Attributes:
        parent: Process id of who it works for.
        grace_s: Seconds for the command to end by itself when it is asked to.
        record: File that tells others (`record.py`).
        lease: The lease that it works under.
        timeout_s: Seconds that the command may take.
        stall_timeout_s: Seconds in which `progress` may stay as it is.
        progress: Files and folders that change while the command comes further.
        stacks: Folder for the stacks of a command that stands still.
        log: File that its output goes to.
        log_offset: Where its output begins there.
        devices: Devices that the command needs; waited for before its start, and no limit counts meanwhile.
    """

    parent: int
    grace_s: float
    record: Path
    lease: LeaseOrders | None = None
    timeout_s: float | None = None
    stall_timeout_s: float | None = None
    progress: tuple[Path, ...] = ()
    stacks: Path | None = None
    log: str = ""
    log_offset: int = 0
    devices: Request | None = None


class Supervisor:
    """Carries out its orders, once."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._duty = Duty(orders.parent, orders.lease)
        self._devices = DeviceLease(orders.devices) if orders.devices is not None else None
        self._asked_to_stop = False
        self._command = -1
        self._status: int | None = None
        self._record: Record | None = None
        self._oom_kills_before = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGUSR1, _wake_up)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked_to_stop = True

    def _reason(self) -> Cause | None:
        """Why it must stop, if it must: somebody asked for it, or there is nobody left to work for."""
        if self._asked_to_stop:
            return "asked"
        return self._duty.over()

    def work(self, command: list[str]) -> int:
        """Run the command to its end, or end it.

        Returns:
            Its exit status, or 128 plus the signal that ended it.
        """
        try:
            begun = self._duty.begin(self._orders.record)
        except OSError as exc:
            _say(f"that work begins can't be written down: {exc}")
            return EXIT_NOT_WRITTEN
        try:
            may_run = begun and self._take_devices(command) and self._reason() is None
            return self._run(command) if may_run else 128 + signal.SIGTERM
        finally:
            if self._devices is not None:
                self._devices.release()
            self._duty.end()

    def _take_devices(self, command: list[str]) -> bool:
        """Wait for the devices that are asked for, and tell for whom; False if the end came first."""
        lease = self._devices
        if lease is None:
            return True
        told = ""
        while (reason := self._reason()) is None:
            try:
                if lease.try_take():
                    break
            except OSError as exc:
                _say(f"no device can be leased: {exc}")
                return False
            if not told:
                self._begin_record(command)  # others see that it is alive
            if lease.obstacle != told:
                told = lease.obstacle
                _say(f"waiting for {lease.wanted}: {told}")
            self._pause()
        if lease.devices:
            _say(f"on {', '.join(device.label for device in lease.devices)}")
        if reason is not None and told:
            self._note(cause=reason, status=128 + signal.SIGTERM)
        return reason is None

    def _run(self, command: list[str]) -> int:
        self._oom_kills_before = oom_kills()
        devices = self._devices
        try:
            # Bound to a name: an unreferenced Popen would collect the exit status itself.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_follow_parent,
                # The command has the lease too, so it lasts if this process is killed and the command is not at once.
                env={**os.environ, **(devices.environment if devices else {})},
                pass_fds=devices.descriptors if devices else (),
            )  # fmt: skip
        except OSError as exc:
            _say(f"{command[0]} can't be started: {exc.strerror}")
            return EXIT_NOT_FOUND
        self._command = process.pid
        self._begin_record(command)
        orders = self._orders
        limits = Limits(orders.timeout_s, orders.stall_timeout_s, orders.progress)
        cause: Cause = "exited"
        while self._reap() and self._status is None:
            if (reason := self._reason() or limits.exceeded()) is not None:
                cause = reason
                self._duty.begin_to_end()
                self._ask_to_end(cause)
                break
            self._pause()
        if cause != "fenced":
            self._end_descendants(signal.SIGTERM, LEFTOVER_GRACE_S)
        self._end_descendants(signal.SIGKILL, KILL_WAIT_S)
        self._redact_log()
        status = self._status if self._status is not None else -signal.SIGKILL
        status = status if status >= 0 else 128 - status
        self._note(cause=cause, status=status, oom_kills=oom_kills() - self._oom_kills_before)
        return status

    def _ask_to_end(self, cause: Cause) -> None:
        """Ask the command alone, and wait for its own end, but no longer than the grace."""
        grace_s = self._orders.grace_s
        if cause == "fenced":
            _say(f"the command is killed ({_WHY[cause]})")
            return
        if cause == "stalled":
            grace_s = min(grace_s, STALLED_GRACE_S)
            self._write_stacks()
        _say(f"asking the command to end ({_WHY[cause]})")
        self._note(cause=cause)  # what stands for work elsewhere looks why, before it ends that as well
        send(signal.SIGTERM, {self._command})
        deadline = time.monotonic() + grace_s
        while self._reap() and self._status is None and time.monotonic() < deadline:
            self._pause()

    def _write_stacks(self) -> None:
        folder = self._orders.stacks
        if folder is None:
            return
        try:
            files = write_stacks(descendants(os.getpid()), folder)
        except OSError as exc:
            _say(f"the stacks can't be written: {exc}")
            return
        _say(f"stacks of {len(files)} processes: {folder}")
        self._note(stacks=str(folder))

    def _redact_log(self) -> None:
        """Whatever the tree wrote of the environment's secrets is taken out, now that nobody writes any more."""
        if self._orders.log:
            try:
                redact_file(Path(self._orders.log), self._orders.log_offset)
            except OSError as exc:
                _say(f"{self._orders.log} can't be searched for secrets: {exc.strerror}")

    def _end_descendants(self, number: signal.Signals, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        reached: set[int] = set()
        while self._reap() and time.monotonic() < deadline:
            new = descendants(os.getpid()) - reached
            if new:
                _say(f"{number.name} to {len(new)} processes: {sorted(new)}")
                send(number, new)
                reached |= new
            self._pause()

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

    def _pause(self) -> None:
        if self._record is not None and time.time() - self._record.heartbeat >= HEARTBEAT_S:
            self._note()
            self._duty.beat()
        time.sleep(POLL_S)

    def _begin_record(self, command: list[str]) -> None:
        now, orders = time.time(), self._orders
        supervisor = ProcessId.of(os.getpid())
        self._record = Record(
            tuple(command), orders.log, orders.log_offset, supervisor, platform.node(), started=now, heartbeat=now
        )
        self._note()

    def _note(self, **changes: Any) -> None:
        """Renew the record. A disk that is full must not end the command: its exit status still tells."""
        assert self._record is not None
        self._record = replace(self._record, heartbeat=time.time(), **changes)
        try:
            self._record.write(self._orders.record)
        except OSError as exc:
            _say(f"{self._orders.record} can't be written: {exc.strerror}")


_WHY: dict[Cause, str] = {
    "asked": "asked to",
    "abandoned": "the run that it works for is gone",
    "fenced": "another machine has taken the lease over",
    "timeout": "its time is up",
    "stalled": "no progress",
}


def _follow_parent() -> None:
    # The last net: if the supervisor itself is killed, its command at least is asked to end.
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wake_up(number: int, frame: FrameType | None) -> None:
    """The parent died: whoever sleeps looks again."""


def _say(text: str) -> None:
    # On a full disk the command goes on, and is ended as it should be. Unbuffered: what could not be written would be
    # tried again at this process's end, and fail its exit status.
    with suppress(OSError):
        os.write(2, f"[supervisor] {text}\n".encode())
