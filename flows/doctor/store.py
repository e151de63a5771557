"""The file system of the store: the store is only as sound as its renames and links are."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flows.doctor.finding import Finding, judged
from mcore.folders import fsync_folder
from tasks.preflight.store import existing_folder

MIN_FREE_GB = 5.0
MIN_FREE_FILES = 10_000
MAX_SKEW_S = 1.0
"""Seconds that the clock of a file server may differ from this machine's."""
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")


def store_findings(store: Path) -> Iterator[Finding]:
    """What holds for a folder of artifacts. It works in a folder of its own, which is gone afterwards."""
    folder = existing_folder(store)
    subject = f"store {folder}"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as work:
            yield from _tried(Path(work), subject)
    except OSError as exc:
        yield Finding(subject, "fail", exc.strerror or str(exc), "Name a folder that can be written to (--store).")
        return
    free_gb = shutil.disk_usage(folder).free / 1e9
    yield judged(f"{subject}: room", free_gb >= MIN_FREE_GB, f"{free_gb:.1f} GB free",
                 "Free some: `mcore-flows artifacts gc`.", otherwise="warn")  # fmt: skip
    stat = os.statvfs(folder)
    if stat.f_files:  # 0 where the file system makes inodes as it goes
        yield judged(f"{subject}: files", stat.f_favail >= MIN_FREE_FILES, f"{stat.f_favail} more files fit",
                     "Free some inodes (df -i).", otherwise="warn")  # fmt: skip
    kind = _file_system(folder)
    if kind:
        fix = "Several machines may share it; keep Prefect's SQLite database elsewhere."
        yield judged(f"{subject}: file system", kind not in NETWORK, kind, fix, otherwise="warn")


def _tried(work: Path, subject: str) -> Iterator[Finding]:
    fix = "Take a local disk, or a network file system with POSIX semantics."
    yield judged(f"{subject}: rename", _replaces(work), "replaces a file in one step", fix)
    yield judged(f"{subject}: folders", _moves_folders(work), "move whole, and never onto a full one", fix)
    yield judged(f"{subject}: hard links", _links_once(work), "are made, and only where nothing is", fix)
    before = time.time()
    (work / "now").touch()
    skew = (work / "now").stat().st_mtime - before
    yield judged(f"{subject}: clock", abs(skew) < MAX_SKEW_S, f"{skew:+.3f} s from this machine's",
                 "Synchronise the clocks (NTP): changed files are known by their times.")  # fmt: skip


def _replaces(work: Path) -> bool:
    old, new = work / "old", work / "new"
    old.write_text("old")
    new.write_text("new")
    reader = old.open()
    new.rename(old)
    fsync_folder(work)
    with reader:  # whoever had it open reads on
        return reader.read() == "old" and old.read_text() == "new" and not new.exists()


def _moves_folders(work: Path) -> bool:
    source, target, full = work / "source", work / "target", work / "full"
    for folder in (source, full):
        folder.mkdir()
        (folder / "file").write_text("content")
    source.rename(target)
    try:
        target.rename(full)
    except OSError:
        return (target / "file").read_text() == "content"
    return False


def _links_once(work: Path) -> bool:
    one, two = work / "one", work / "two"
    one.write_text("content")
    try:
        two.hardlink_to(one)
    except OSError:
        return False
    try:
        two.hardlink_to(one)
    except FileExistsError:
        return one.stat().st_nlink == 2
    return False


def _file_system(folder: Path) -> str:
    """Type of the mount that a folder is on; empty if that is not told."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except (OSError, ValueError):
        return ""
    above = {str(place) for place in (folder, *folder.parents)}
    found = [(len(place), kind) for place, kind in mounts if place in above]
    return max(found, default=(0, ""))[1]
