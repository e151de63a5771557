"""A command that another process had its supervisor start, followed and ended as if it had been started here."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mcore.leases import Lease
from mcore.supervise.claims import Work, works
from mcore.supervise.processes import send
from mcore.supervise.record import read_record

POLL_S = 0.05


class Attached:
    """What `subprocess.Popen` is for a child, for a supervisor that is nobody's child here.

    Attributes:
        pid: The supervisor.
        returncode: Exit status once it has ended: as it wrote down, or -9 if it could not.
    """

    def __init__(self, work: Work) -> None:
        self.pid = work.supervisor.pid
        self.returncode: int | None = None
        self._work = work

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: It goes on.
        """
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self._work.supervisor.is_alive():
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self._work.command, timeout or 0.0)
            time.sleep(POLL_S)
        record = read_record(Path(self._work.record))
        told = record is not None and record.supervisor == self._work.supervisor and record.status is not None
        self.returncode = record.status if told and record is not None else -signal.SIGKILL
        return self.returncode or 0

    def terminate(self) -> None:
        """Ask it to end its command."""
        if self._work.supervisor.is_alive():
            send(signal.SIGTERM, [self.pid])


def command_digest(words: Sequence[str], log_folder: Path) -> str:
    """Tells a command from others of the same stage. Where its log goes is no difference: each run has its folder."""
    text = "\0".join(word.replace(str(log_folder), "") for word in words)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def attach(lease: Lease, command: str, on_tick: Callable[[], None] | None) -> Work | None:
    """The supervisor of a former holder, if it runs just this command; one that runs another is ended first."""
    work, lease.adopted = lease.adopted, None
    if work is None or work.command == command:
        return work
    end_work_of(lease, work, on_tick)
    return None


def end_work_of(lease: Lease, work: Work, on_tick: Callable[[], None] | None = None) -> None:
    """Ask a supervisor to end its command, and wait until it has."""
    supervisor = Attached(work)
    supervisor.terminate()
    while any(one.supervisor == work.supervisor for one in works(lease.folder)):
        if on_tick is not None:
            on_tick()
        time.sleep(POLL_S)
