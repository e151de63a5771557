"""SIGTERM, Ctrl-C and a time limit mean: finish the step, save, leave with the code that says "run me again"."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop. What all ranks do about it is agreed on at the end of a step.

    Attributes:
        received: Whether it was.
        since_s: When the process began to listen, which time limits are counted from (`time.monotonic`).
    """

    def __init__(self) -> None:
        self.received = False
        self.since_s = time.monotonic()

    def note(self, signum: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Remember the request; torchrun and a scheduler may both send one."""
        self.received = True


class TimeLimit:
    """When a process has to save to be gone in time.

    Args:
        minutes: That it may take in all; None for no limit.
        since_s: When it began (`time.monotonic`).
    """

    def __init__(self, minutes: float | None, since_s: float) -> None:
        self._end_s = float("inf") if minutes is None else since_s + 60 * minutes
        self._longest_turn_s = 0.0
        self._last_s: float | None = None

    def is_up(self, save_s: float) -> bool:
        """Whether one more step might end too late; asked once a step.

        Args:
            save_s: Seconds that a save takes at most. A step is taken to take what the longest one took, with the
                validation and the save behind it.
        """
        now_s = time.monotonic()
        if self._last_s is not None:
            self._longest_turn_s = max(self._longest_turn_s, now_s - self._last_s)
        self._last_s = now_s
        return now_s + self._longest_turn_s + save_s >= self._end_s


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT while the block runs, and put the old handlers back behind it."""
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
