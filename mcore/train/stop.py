"""SIGTERM and Ctrl-C mean: finish the step, save, leave with the code that says "run me again"."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop. What all ranks do about it is agreed on at the end of a step."""

    def __init__(self) -> None:
        self.received = False

    def note(self, signum: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Remember the request; torchrun and a scheduler may both send one."""
        self.received = True


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
