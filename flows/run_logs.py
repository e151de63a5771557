"""The logs of a run's stages, as files, also while they grow."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from mcore.artifacts import Store
from mcore.runs import RunRecord, is_under_way

LOG = "stage.log"
POLL_S = 0.25


def logs(store: Store, record: RunRecord) -> dict[str, Path]:
    """The log of each stage that has one, in the stages' order."""
    paths = {stage.name: store.run_dir(record.name) / stage.name / LOG for stage in record.stages}
    return {name: path for name, path in paths.items() if path.is_file()}


def newest(found: dict[str, Path]) -> str | None:
    """The stage whose log was written last."""
    times = {name: path.stat().st_mtime_ns for name, path in found.items() if path.exists()}
    return max(times, key=lambda name: times[name], default=None)


def last_lines(path: Path, number: int | None) -> Iterator[str]:
    """The last lines of a file, or all of them."""
    with path.open(errors="replace") as file:
        lines = file if number is None else deque(file, maxlen=number)
        for line in lines:
            yield line.rstrip("\n")


class Follower:
    """Reads what is new of a log. One that was replaced or cut, as a new attempt does, is read from its beginning.

    Args:
        path: The log.
        number: Lines to start with that are there already; all if None.
    """

    def __init__(self, path: Path, number: int | None) -> None:
        self._path = path
        self._rest = b""
        self._offset = 0
        self._inode = -1
        self._skip = number

    def read(self, *, final: bool = False) -> list[str]:
        """Whole lines that were not read yet; `final` also takes a last line without an end."""
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    self._inode, self._offset, self._rest = stat.st_ino, 0, b""
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        if final and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        if self._skip is not None:  # what was there at the first look
            lines, self._skip = lines[max(0, len(lines) - self._skip) :], None
        return [line.decode(errors="replace") for line in lines]


def follow(
    store: Store, record: RunRecord, stage: str | None, number: int | None, wait: Callable[[float], None] = time.sleep
) -> Iterator[tuple[str, str]]:
    """Lines of a run's logs with their stage, as they come, until the run is over.

    Args:
        store: The store.
        record: The run.
        stage: The stage; the one that writes now, and those behind it, if None.
        number: Lines to start with that are there already; all if None.
        wait: Takes the seconds to pause.
    """
    order = [stage] if stage is not None else [one.name for one in record.stages]
    followers: dict[str, Follower] = {}
    begun = False
    while True:
        over = not is_under_way(store, record.name)  # asked before the read, so that its last lines are not missed
        found = logs(store, record)
        if not begun and stage is None and (at := newest(found)) is not None:
            order = order[order.index(at) :]
        begun = begun or bool(found)
        for name in order:
            if name in found and name not in followers:
                followers[name] = Follower(found[name], number if not followers else None)
            if name in followers:
                for line in followers[name].read(final=over):
                    yield name, line
        if over:
            return
        wait(POLL_S)
