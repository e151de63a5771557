"""A progress bar with ETA on a terminal, and a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
"""Seconds between two lines where the output is no terminal."""


def say(text: str) -> None:
    """Write one line to standard error at once: what a stage tells while it works."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def progress(what: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show how far `what` has come while the block runs.

    Args:
        what: What is being done, such as `convert`.
        total: Number of units to do.
        unit: What is counted, such as `tensors`.

    Yields:
        A function that takes the number of units done since the last call.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count=1: bar.advance(task, count)
        return
    start = last = time.monotonic()
    done = 0

    def advance(count: int = 1) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= LINE_EVERY_S and done < total:
            eta_s = (now - start) / done * (total - done) if done else 0.0
            say(f"{what}: {done}/{total} {unit}, {now - start:.0f} s, ETA {eta_s:.0f} s")
            last = now

    yield advance
    say(f"{what}: {done}/{total} {unit} in {time.monotonic() - start:.1f} s")
