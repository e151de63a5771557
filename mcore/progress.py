"""A progress bar with ETA on a terminal, and a line every few seconds in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_EVERY_S = 10.0
"""Seconds between two lines where the output is no terminal."""


class Advance(Protocol):
    """Tells how far the work has come."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Report `count` more units done, and what is worth showing beside them, such as `loss 1.23`."""


def say(text: str, file: TextIO | None = None) -> None:
    """Write one line at once, to standard error if no file is given: what a stage tells while it works.

    Who reads it may go away, as `| head` does, or a terminal. That fails no work: what else comes goes nowhere.
    """
    file = file or sys.stderr
    try:
        file.write(f"{text}\n")
        file.flush()
    except OSError:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())


@contextmanager
def progress(what: str, total: int, unit: str = "", done: int = 0) -> Iterator[Advance]:
    """Show how far `what` has come while the block runs.

    Args:
        what: What is being done, such as `convert`.
        total: Number of units to do.
        unit: What is counted, such as `tensors`. `bytes` are shown in the unit that suits them, with their speed.
        done: Units that were done before the block started, by a run that this one resumes.

    Yields:
        A function that takes the number of units done since the last call.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        of_bytes = (DownloadColumn(), TransferSpeedColumn())
        count = of_bytes if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *count,
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def move(count: int = 1, note: str = "") -> None:
                bar.update(task, advance=count, note=note)

            yield move
        return
    start = last = time.monotonic()
    done_before = done

    def so_far() -> str:
        if unit == "bytes":
            return f"{decimal(done)}/{decimal(total)}"
        return f"{done}/{total} {unit}"

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= LINE_EVERY_S and done < total:
            eta_s = (now - start) / (done - done_before) * (total - done) if done > done_before else 0.0
            tail = f", {note}" if note else ""
            say(f"{what}: {so_far()}, {now - start:.0f} s, ETA {eta_s:.0f} s{tail}")
            last = now

    yield advance
    say(f"{what}: {so_far()} in {time.monotonic() - start:.1f} s")
