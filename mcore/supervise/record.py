"""What is known of one execution of a command: written by its supervisor, read by whoever wants to know.

The file is there from the start of the command and is renewed every few seconds while any process of it lives. At the
end it says how it ended, and why. Nobody needs a server, or the process that started it, to tell.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mcore.supervise.processes import ProcessId

HEARTBEAT_S = 5.0
"""Seconds between two signs of life."""
LOST_AFTER_S = 60.0
"""Seconds without a sign of life after which a process of another machine counts as lost."""

Cause = Literal["exited", "asked", "abandoned", "fenced", "timeout", "stalled"]
"""Why a command ended: by itself, because somebody asked for it, because nobody was left to work for, because another
machine had taken its lease over, or at a limit."""


@dataclass(frozen=True, slots=True)
class Record:
    """One execution.

    Attributes:
        command: Its words.
        log: File that all its output goes to, or empty.
        log_offset: Where its output begins in there, in bytes.
        supervisor: The process that ends it.
        host: Name of the machine, for people.
        started: When it started (seconds since 1970).
        heartbeat: The last sign of life (seconds since 1970).
        cause: Why it ended; empty while it lives.
        status: Exit status, or 128 plus the signal that ended it; None while it lives.
        oom_kills: Processes that the kernel killed for want of memory meanwhile, in this process's control group or,
            where that can't be asked, on the machine.
        stacks: Folder with the stacks of its processes, if they were written.
    """

    command: tuple[str, ...]
    log: str
    log_offset: int
    supervisor: ProcessId
    host: str
    started: float
    heartbeat: float
    cause: str = ""
    status: int | None = None
    oom_kills: int = 0
    stacks: str = ""

    def is_alive(self) -> bool:
        """Whether its supervisor is at work; of another machine's, whether it was a minute ago."""
        if self.status is not None:
            return False
        if self.supervisor.is_here:
            return self.supervisor.is_alive()
        return time.time() - self.heartbeat < LOST_AFTER_S

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(asdict(self), indent=2))
        temporary.rename(path)


def read_record(path: Path) -> Record | None:
    """The record in a file; None if there is none, or none of ours."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        found["supervisor"] = ProcessId(**found["supervisor"])
        found["command"] = tuple(found["command"])
        return Record(**found)
    except (OSError, ValueError, TypeError, KeyError):
        return None
