"""Whom a supervisor works for: who started it, then whoever took the lease over from that; in the end, nobody."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mcore.supervise.claims import (
    Work,
    beat,
    begin_to_end,
    begin_work,
    end_work,
    has_heir,
    newest_claim,
    newest_token,
)
from mcore.supervise.processes import ProcessId

LOOK_EVERY_S = 1.0
"""Seconds between two looks at the lease."""
HEIR_WAIT_S = 10.0
"""Seconds that a process that waits for the lease gets to take it over."""


@dataclass(frozen=True, slots=True)
class LeaseOrders:
    """The lease that a supervisor works under.

    Attributes:
        folder: Its folder (`claims.py`).
        token: Token of the claim that it was started under.
        command: Tells the command from others of the same stage.
        error_file: Where the command leaves an error.
        reattach_s: Seconds that it goes on behind the end of whoever it works for, so that somebody may take it over.
    """

    folder: Path
    token: int
    command: str = ""
    error_file: str = ""
    reattach_s: float = 0.0


class Duty:
    """Tells when there is nobody left to work for.

    Args:
        parent: Process id of who started it.
        lease: The lease that it works under, if any.
    """

    def __init__(self, parent: int, lease: LeaseOrders | None) -> None:
        self._parent = parent
        self._lease = lease
        self._master: ProcessId | None = None  # who took it over
        self._follows = lease.token if lease is not None else 0
        self._gone_since_s: float | None = None
        self._patience_s = 0.0
        self._looked_s = -LOOK_EVERY_S

    def begin(self, record: Path) -> bool:
        """Say that work begins; False if somebody has taken the lease over by then.

        Said first and looked then: who takes over looks in the other order, so one of the two sees the other.

        Raises:
            OSError: It can't be said.
        """
        if self._lease is None:
            return True
        lease = self._lease
        work = Work(lease.token, ProcessId.of(os.getpid()), lease.command, str(record), lease.error_file)
        begin_work(lease.folder, work)
        return newest_token(lease.folder) == lease.token

    def over(self) -> Literal["abandoned", "fenced"] | None:
        """Whether it is over: nobody is left to work for, or somebody elsewhere holds the lease now."""
        gone = not self._is_master_alive()
        if self._lease is None:
            return "abandoned" if gone else None
        now = time.monotonic()
        if gone or now - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now
            if self._is_fenced(self._lease.folder):
                return "fenced"
            gone = not self._is_master_alive()
        if not gone:
            self._gone_since_s = None
            return None
        if self._gone_since_s is None:
            self._gone_since_s = now
            heir_s = HEIR_WAIT_S if has_heir(self._lease.folder) else 0.0
            self._patience_s = max(self._lease.reattach_s, heir_s)
        return "abandoned" if now - self._gone_since_s >= self._patience_s else None

    def _is_master_alive(self) -> bool:
        if self._master is not None:
            return self._master.is_alive()
        return os.getppid() == self._parent

    def _is_fenced(self, folder: Path) -> bool:
        """Whether the lease is another machine's now; a process of this one that took it over is worked for."""
        try:
            claim = newest_claim(folder)
        except OSError:
            return False  # nobody can be seen to hold it
        if claim is None or claim.token <= self._follows or claim.is_free:
            return False
        if not claim.process.is_here:
            return True
        self._master, self._follows = claim.process, claim.token
        return False

    def beat(self) -> None:
        """Give a sign of life under the lease."""
        if self._lease is not None:
            beat(self._lease.folder, self._lease.token)

    def begin_to_end(self) -> None:
        """The command is about to be ended: nobody may take it over any more."""
        if self._lease is not None:
            begin_to_end(self._lease.folder, self._lease.token)

    def end(self) -> None:
        """All has ended."""
        if self._lease is not None:
            end_work(self._lease.folder, self._lease.token)
