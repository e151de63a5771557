"""How long a command may take, and how long it may stand still."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

LOOK_EVERY_S = 1.0


class Limits:
    """Counted from when it is made.

    Args:
        timeout_s: Seconds it may take in all; None for no limit.
        stall_timeout_s: Seconds in which none of the `progress` paths changes; None for no limit.
        progress: Files that grow, and folders that get new entries, while the command comes further.
    """

    def __init__(self, timeout_s: float | None, stall_timeout_s: float | None, progress: Sequence[Path]) -> None:
        now = time.monotonic()
        self._deadline = now + timeout_s if timeout_s is not None else float("inf")
        self._stall_timeout_s = stall_timeout_s if stall_timeout_s is not None else float("inf")
        self._progress = tuple(progress)
        self._seen = self._look()
        self._changed_s = self._looked_s = now

    def exceeded(self) -> Literal["timeout", "stalled"] | None:
        """Which of them is over, if one is."""
        now = time.monotonic()
        if now >= self._deadline:
            return "timeout"
        if now - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now
            if (seen := self._look()) != self._seen:
                self._seen, self._changed_s = seen, now
        return "stalled" if now - self._changed_s >= self._stall_timeout_s else None

    def _look(self) -> list[tuple[int, int] | None]:
        return [_mark(path) for path in self._progress]


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None  # not made yet
    return stat.st_size, stat.st_mtime_ns
