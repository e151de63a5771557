"""What lies in the folder of a lease, which says who may make one artifact, or has one name, and how each file changes.

    <store>/.leases/<kind>-<key>/
        00000007.held     who claimed it last, with the 7th token; linked into place, so two never get the same one
        00000007.free     the same, renamed when the holder let go; the highest number counts, so it is never deleted
        00000007.beat     the holder's last sign of life
        00000007.work     the supervisor that works for that claim
        00000007.ending   the same, renamed when it begins to end its command: nobody may take that over any more
        waits-….json      a process that waits for the lease

Every claim has a file of its own, so whoever was taken over from can renew what it likes: it changes nothing that
counts. Only `link` and `rename` decide anything, which are one step on a shared file system too; no lock of the kernel
is needed, so none is lost between hosts. Letting go takes no room on a disk that is full.

Only the standard library is imported: the supervisor reads and writes these files.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mcore.supervise.processes import ProcessId

HELD, FREE, BEAT, WORK, ENDING = ".held", ".free", ".beat", ".work", ".ending"
CLAIMS, WORKS = (HELD, FREE), (WORK, ENDING)
WAITS = "waits-"
LEFT_AFTER_S = 3600.0
"""Seconds after which a file that never took its name was left by a kill; nobody takes so long over one line."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Who holds a lease, or held it last.

    Attributes:
        token: Number of the claim; each is higher than the one before.
        process: The process that holds it.
        host: Name of the machine, for people.
        run: Name of the run.
        flow_run: Id of Prefect's flow run, or empty.
        folder: Where the holder's log is, or empty.
        since: When it was claimed (seconds since 1970).
        is_free: Whether the holder let go of it.
        told: What the holder had to say when it let go, such as what failed.
    """

    token: int
    process: ProcessId
    host: str
    run: str = ""
    flow_run: str = ""
    folder: str = ""
    since: float = 0.0
    is_free: bool = False
    told: str = ""

    @property
    def is_provably_over(self) -> bool:
        """Whether it was let go of, or its holder was a process of this machine that is no more."""
        return self.is_free or (self.process.is_here and not self.process.is_alive())


@dataclass(frozen=True, slots=True)
class Work:
    """A supervisor that works for a claim.

    Attributes:
        token: The claim's.
        supervisor: Its process.
        command: Tells its command from others of the same stage.
        record: Its record (`record.py`).
        error_file: Where its command leaves an error.
        is_ending: Whether it has begun to end its command, for another reason than the command's own end.
    """

    token: int
    supervisor: ProcessId
    command: str
    record: str
    error_file: str
    is_ending: bool = False

    @property
    def is_provably_over(self) -> bool:
        """Whether its process was of this machine and is no more."""
        return self.supervisor.is_here and not self.supervisor.is_alive()


def numbered(folder: Path, *suffixes: str) -> list[tuple[int, str]]:
    """Token and suffix of the files that are there, lowest first."""
    try:
        found = [(path.stem, path.suffix) for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted((int(stem), suffix) for stem, suffix in found if suffix in suffixes and stem.isdigit())


def path_of(folder: Path, token: int, suffix: str) -> Path:
    """The file of a token."""
    return folder / f"{token:08d}{suffix}"


def newest_token(folder: Path) -> int:
    """The highest token that was given; 0 if none was."""
    return max((token for token, _ in numbered(folder, *CLAIMS)), default=0)


def newest_claim(folder: Path) -> Claim | None:
    """The claim that counts; None if nobody ever had one.

    Of one that can't be read, as a power cut leaves it, the process is unknown: only its signs of life tell of it.
    """
    while found := numbered(folder, *CLAIMS):
        token, suffix = max(found, key=lambda one: (one[0], one[1] == HELD))
        try:
            data: dict[str, Any] = json.loads(path_of(folder, token, suffix).read_text())
            process = ProcessId(**data.pop("process"))
            told = path_of(folder, token, ".told")
            data["told"] = told.read_text(errors="replace") if suffix == FREE and told.exists() else ""
            return Claim(**{**data, "process": process, "token": token, "is_free": suffix == FREE})
        except FileNotFoundError:
            continue  # it was let go of, or a later one is there, between the two looks
        except (KeyError, TypeError, AttributeError, ValueError):
            return Claim(token, ProcessId("unknown", 0, 0), "an unknown machine", is_free=suffix == FREE)
    return None


def link_claim(folder: Path, claim: Claim) -> bool:
    """Put a claim in place, unless somebody has one with this token or a higher one.

    An answer that is lost on its way to a file server makes a link that was made look like another's, so it is looked
    at. Who comes late, with a token that was given and forgotten, sees the higher one and draws back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = path_of(folder, claim.token, HELD)
    temporary = folder / f".{uuid.uuid4().hex}"
    try:
        temporary.write_text(json.dumps(asdict(claim)))
        try:
            place.hardlink_to(temporary)
        except FileExistsError:
            if not place.exists() or not place.samefile(temporary):
                return False
        if max(numbered(folder, *CLAIMS)) != (claim.token, HELD) or path_of(folder, claim.token, FREE).exists():
            place.unlink(missing_ok=True)
            return False
        beat(folder, claim.token)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def let_go(folder: Path, token: int, told: str = "") -> None:
    """Free a claim: one rename. What there is to tell is left out if it finds no room."""
    if told:
        with suppress(OSError):
            path_of(folder, token, ".told").write_text(told)
    with suppress(FileNotFoundError):  # it was taken over, and is forgotten
        path_of(folder, token, HELD).rename(path_of(folder, token, FREE))


def beat(folder: Path, token: int) -> None:
    """Give a sign of life. Written over in place: that takes no room, and readers of other hosts see it on opening."""
    with suppress(OSError):
        descriptor = os.open(path_of(folder, token, BEAT), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(descriptor, f"{time.time():020.6f}".encode(), 0)
        finally:
            os.close(descriptor)


def last_beat(folder: Path, token: int) -> str:
    """The last sign of life: the time by the holder's clock, to be compared with another look, not with a clock."""
    try:
        return path_of(folder, token, BEAT).read_text(errors="replace")
    except OSError:
        return ""


def begin_work(folder: Path, work: Work) -> None:
    """Tell others of a supervisor."""
    temporary = folder / f".{uuid.uuid4().hex}"
    temporary.write_text(json.dumps(asdict(work)))
    temporary.rename(path_of(folder, work.token, WORK))


def begin_to_end(folder: Path, token: int) -> None:
    """From here on nobody may take the supervisor over."""
    with suppress(OSError):
        path_of(folder, token, WORK).rename(path_of(folder, token, ENDING))


def end_work(folder: Path, token: int) -> None:
    """The supervisor's command has ended, and all that came of it."""
    for suffix in WORKS:
        with suppress(OSError):
            path_of(folder, token, suffix).unlink(missing_ok=True)


def works(folder: Path) -> list[Work]:
    """The supervisors that are at work, or may be, as they are on another machine."""
    found = []
    for token, suffix in numbered(folder, *WORKS):
        try:
            data: dict[str, Any] = json.loads(path_of(folder, token, suffix).read_text())
            work = Work(**{**data, "supervisor": ProcessId(**data["supervisor"])})
        except (OSError, KeyError, TypeError, ValueError):
            continue
        if not work.is_provably_over:
            found.append(replace(work, is_ending=suffix == ENDING))
    return found


def forget(folder: Path, below: int) -> None:
    """Delete what earlier tokens left, but for those that somebody may still work for, and what kills left unnamed."""
    at_work = {work.token for work in works(folder)}
    for token, suffix in numbered(folder, *CLAIMS, *WORKS, BEAT, ".told"):
        if token < below and token not in at_work:
            path_of(folder, token, suffix).unlink(missing_ok=True)
    for path in folder.glob(".*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFT_AFTER_S:
                path.unlink(missing_ok=True)


def waiting(folder: Path) -> Iterator[tuple[Path, ProcessId]]:
    """The processes that wait for the lease, with their files; also of some that are no more."""
    for path in sorted(folder.glob(f"{WAITS}*")):
        with suppress(OSError, TypeError, ValueError):
            yield path, ProcessId(**json.loads(path.read_text()))


def has_heir(folder: Path) -> bool:
    """Whether a process of this machine waits, which would go on with the work."""
    return any(process.is_here and process.is_alive() for _, process in waiting(folder))
