"""Leases: the right to make one artifact, or to have one name, held by one process at a time and never left behind.

A lease whose holder is provably dead, a process of this machine that is no more, is taken over at once. Of another
machine nobody can say, so its signs of life are watched: if none comes for `LOST_AFTER_S`, counted by the clock of who
waits, the holder is lost. No two clocks are compared, so it does not matter what they say.

Each claim has a higher token than the one before. Who was taken over from finds a higher one than its own and is
fenced: it may not publish. `mcore/supervise/claims.py` describes the files.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from mcore.errors import ArtifactError, FencedError
from mcore.supervise.claims import (
    HELD,
    WAITS,
    Claim,
    Work,
    beat,
    forget,
    last_beat,
    let_go,
    link_claim,
    newest_claim,
    newest_token,
    path_of,
    waiting,
    works,
)
from mcore.supervise.processes import ProcessId
from mcore.supervise.record import HEARTBEAT_S, LOST_AFTER_S

POLL_S = 0.2
FORGOTTEN_AFTER_S = 86400.0
"""Seconds for which one look, which can't wait for a sign of life, takes a holder of another machine for alive. Clocks
of two machines are compared here, so they may be apart by as much."""

OnWait = Callable[[Claim], None]
"""Called several times a second with who holds what is waited for; may raise."""


class Lease:
    """A lease that this process holds. It gives signs of life from a thread of its own until it is let go of.

    Attributes:
        folder: Its folder.
        claim: The claim by which it is held.
        before: The claim before it, if there was one that counted.
        adopted: A supervisor of a former holder that is at work, which this holder has to take over or to end.
    """

    def __init__(self, folder: Path, claim: Claim, before: Claim | None) -> None:
        self.folder = folder
        self.claim = claim
        self.before = before
        self.adopted: Work | None = None
        self._over = threading.Event()
        threading.Thread(target=self._beat_on, name="signs of life", daemon=True).start()

    def _beat_on(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            beat(self.folder, self.claim.token)

    def renew(self) -> None:
        """Take the next token, which nobody gets who has not taken over: so what follows is this holder's to do.

        Raises:
            FencedError: Somebody has taken over.
        """
        claim = replace(self.claim, token=self.claim.token + 1)
        if newest_token(self.folder) != self.claim.token or not link_claim(self.folder, claim):
            raise FencedError(
                "another run has taken over what this one was making",
                [f"{self.folder}: token {self.claim.token} is no more the highest; nothing was published"],
            )
        self.claim = claim
        forget(self.folder, claim.token)

    def let_go(self, told: str = "") -> None:
        """Free it; `told` is for who takes it next."""
        self._over.set()
        let_go(self.folder, self.claim.token, told)


def acquire(
    folder: Path,
    *,
    run: str = "",
    flow_run: str = "",
    log_folder: Path | None = None,
    timeout_s: float = -1,
    on_wait: OnWait | None = None,
) -> Lease:
    """Wait until nobody else holds a lease, and take it.

    Processes that still work for a former holder, on their way to their end, are waited for as well. One that is not
    ending, and that this process can take over, is `Lease.adopted`.

    Args:
        folder: The lease's folder.
        run: Name of the run that wants it.
        flow_run: Id of Prefect's flow run.
        log_folder: Where this holder's log will be.
        timeout_s: Seconds to wait for the holder; without end if negative.
        on_wait: Called while it is waited for.

    Raises:
        ArtifactError: Somebody else held it for longer than `timeout_s`.
    """
    claim = Claim(
        0, ProcessId.of(os.getpid()), platform.node(), run, flow_run, "" if log_folder is None else str(log_folder)
    )
    observer = Observer(folder)
    with _Queue(folder) as queue:
        lease = None
        deadline = time.monotonic() + timeout_s if timeout_s >= 0 else float("inf")
        while lease is None:
            before = newest_claim(folder)
            if before is None or before.is_free or observer.is_over(before):
                lease = _claim(folder, claim, before)
            elif time.monotonic() >= deadline:
                raise ArtifactError(f"{folder.name} is held by another run", [describe(before)])
            else:
                queue.enter()
                if on_wait is not None:
                    on_wait(before)
                time.sleep(POLL_S)
        try:
            lease.adopted = _wait_for_works(lease, observer, deadline, on_wait)
        except BaseException:
            lease.let_go()
            raise
    return lease


def _claim(folder: Path, claim: Claim, before: Claim | None) -> Lease | None:
    token = 1 if before is None else before.token + 1
    claim = replace(claim, token=token, since=time.time())
    if not link_claim(folder, claim):
        return None  # somebody was quicker
    forget(folder, token)
    return Lease(folder, claim, before)


def _wait_for_works(lease: Lease, observer: Observer, deadline: float, on_wait: OnWait | None) -> Work | None:
    """The supervisor that can be taken over, if there is one; all others have ended by then."""
    while True:
        others = [work for work in works(lease.folder) if work.supervisor.is_here or not observer.is_silent(work.token)]
        if not others:
            return None
        if len(others) == 1 and others[0].supervisor.is_here and not others[0].is_ending:
            return others[0]
        if time.monotonic() >= deadline:
            raise ArtifactError(f"{lease.folder.name} is still worked at", [describe(lease.before or lease.claim)])
        if on_wait is not None:
            on_wait(lease.before or lease.claim)
        time.sleep(POLL_S)


class Observer:
    """Watches signs of life by its own clock.

    Args:
        folder: The lease's folder.
        lost_after_s: Seconds without a new one after which a holder of another machine is lost.
    """

    def __init__(self, folder: Path, lost_after_s: float | None = None) -> None:
        self._folder = folder
        self._lost_after_s = LOST_AFTER_S if lost_after_s is None else lost_after_s
        self._seen: dict[int, tuple[str, float]] = {}

    def is_silent(self, token: int) -> bool:
        """Whether no sign of life came for so long, while this one watched."""
        now, found = time.monotonic(), last_beat(self._folder, token)
        if token not in self._seen or self._seen[token][0] != found:
            self._seen[token] = (found, now)
        return now - self._seen[token][1] >= self._lost_after_s

    def is_over(self, claim: Claim) -> bool:
        """Whether a holder is dead or lost."""
        if claim.process.is_here:
            return not claim.process.is_alive()
        return self.is_silent(claim.token)


class _Queue:
    """Tells the supervisor of who holds a lease that somebody waits, who would go on with its work."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None

    def enter(self) -> None:
        if self._path is not None:
            return
        for path, process in waiting(self._folder):
            if process.is_here and not process.is_alive():
                path.unlink(missing_ok=True)
        self._path = self._folder / f"{WAITS}{uuid.uuid4().hex}.json"
        with suppress(OSError):  # the disk is full: then nobody goes on with the work, and it is started again
            temporary = self._folder / f".{self._path.name}"
            temporary.write_text(json.dumps(asdict(ProcessId.of(os.getpid()))))
            temporary.rename(self._path)

    def __enter__(self) -> _Queue:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@contextmanager
def held(
    folder: Path,
    *,
    run: str = "",
    flow_run: str = "",
    log_folder: Path | None = None,
    timeout_s: float = -1,
    on_wait: OnWait | None = None,
) -> Iterator[Lease]:
    """Hold a lease for the block; arguments as of `acquire`. An error is told to who takes it next."""
    lease = acquire(folder, run=run, flow_run=flow_run, log_folder=log_folder, timeout_s=timeout_s, on_wait=on_wait)
    told = ""
    try:
        yield lease
    except BaseException as exc:
        told = f"{type(exc).__name__}: {getattr(exc, 'summary', exc)}".partition("\n")[0]
        raise
    finally:
        lease.let_go(told)


def holder(folder: Path) -> Claim | None:
    """Who holds a lease, or whose processes are still at work, by one look that writes nothing; None if nobody.

    A holder of another machine counts as alive for a day: this look can't wait for its next sign of life.
    """
    claim = newest_claim(folder)
    if claim is None:
        return None
    if not claim.is_provably_over and (claim.process.is_here or _was_alive_lately(folder, claim.token)):
        return claim
    at_work = [work for work in works(folder) if work.supervisor.is_here or _was_alive_lately(folder, work.token)]
    return claim if at_work else None


def _was_alive_lately(folder: Path, token: int) -> bool:
    told = last_beat(folder, token)
    with suppress(ValueError, OSError):
        since = float(told) if told else path_of(folder, token, HELD).stat().st_mtime
        return time.time() - since < FORGOTTEN_AFTER_S
    return True  # it is being written


def describe(claim: Claim) -> str:
    """Who holds it, for people: `run nightly (process 4711 on node3)`."""
    run = f"run {claim.run}" if claim.run else "another run"
    return f"{run} (process {claim.process.pid} on {claim.host})"
