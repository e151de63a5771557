"""A disk that is full in the middle of a stage: the run fails and says so, nothing half made is seen, and it goes on.

The store is on a small tmpfs of its own, which is filled at the moment in question: preflight refuses a run that finds
too little room at its start.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mcore.artifacts import MANIFEST, Store
from tests.faults.conftest import Undisturbed
from tests.faults.disturbed import Disturbed, ended_at, is_at, is_at_work, told
from tests.faults.server_runs import RUN

pytestmark = [pytest.mark.faults, pytest.mark.endurance]

DISK_MIB = 64


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"A FULL DISK IS NOT TESTED: no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, room: int) -> Path:
    """Fill a disk but for some bytes. Returns what takes the room."""
    ballast = disk / "ballast"
    with ballast.open("ab") as file:
        while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize) > room:
            try:
                os.posix_fallocate(file.fileno(), file.tell(), free - room)
            except OSError as exc:
                assert exc.errno == errno.ENOSPC  # somebody else was quicker
            file.seek(0, os.SEEK_END)
    return ballast


def behind_a_save(store: Store) -> bool:
    return is_at(store.root, 25)


def is_to_be_committed(store: Store) -> bool:
    """Whether all of a converted base is there but its manifest."""
    return any(store.root.glob(".partial/convert-*/metrics.json"))


@dataclass(frozen=True)
class Case:
    """A moment, the stage that it is in, and the kind of artifact that nearly finds room then; else nothing."""

    stage: str
    moment: Callable[[Store], bool]
    nearly_fits: str = ""


CASES = {
    "convert": Case("convert", lambda store: is_at_work(store, "tiny", "convert"), "convert"),
    "save": Case("train", behind_a_save),
    "export": Case("export", lambda store: is_at_work(store, "tiny", "export"), "export"),
    "manifest": Case("convert", is_to_be_committed),
}
TOO_LITTLE = 12 * 1024


def room_for(kind: str, undisturbed: Store) -> int:
    """Bytes that an artifact's files take on the disk, holes left out, but for the last few."""
    files = [file for file in undisturbed.root.glob(f"{kind}/*/**/*") if file.is_file() and file.name != MANIFEST]
    return sum(file.stat().st_blocks * 512 for file in files) - TOO_LITTLE


@pytest.mark.parametrize("name", CASES)
def test_the_run_fails_says_so_and_goes_on(
    disk: Path, workspace: Path, undisturbed: Undisturbed, prefect_api_url: str, name: str
) -> None:
    case, before = CASES[name], undisturbed(RUN)
    run = Disturbed(workspace, f"disk-{name}", RUN, store=disk / name, api_url=prefect_api_url)
    room = room_for(case.nearly_fits, before.store) if case.nearly_fits else 0
    flow = run.start()
    run.wait_until(lambda: case.moment(run.store), f"no moment of {name}")
    flow.send_signal(signal.SIGSTOP)  # it must not come further before the disk is full
    ballast = fill(disk, room)
    flow.send_signal(signal.SIGCONT)
    try:
        log = run.fails()
        assert "No space left on device" in log
        assert ended_at(told(run.store, "tiny")) == ("failed", case.stage)
    finally:
        ballast.unlink()
    run.finish(before.exported())
