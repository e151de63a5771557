"""Holding devices: who asked first gets them first, all that it asked for or none.

    <folder>/<device>.lock     locked by the holder; says who that is
    <folder>/turn              locked for the moment in which somebody looks
    <folder>/queue/<number>    locked by somebody who waits; says what for

Nobody holds some devices and waits for others, so there is no deadlock. Who waits goes before all who came later and
could take something from it, so a large request is not starved by small ones; requests for other devices pass by. A
lock goes with its holder's last process, a place in the queue likewise.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcore.devices.request import IN_USE_SHARE, Device, Request

LOOK_AGAIN_S = 5.0
"""Seconds between two looks at who uses a GPU; locks are looked at every time."""


class DeviceLease:
    """Devices that are held from when `try_take` says so until `release`, or until the last process ends that has them.

    Args:
        request: What is asked for.
        candidates: Devices to choose from; asked for again as time goes by.
    """

    def __init__(self, request: Request, candidates: Callable[[], list[Device]] | None = None) -> None:
        self._request = request
        self._ask = candidates or request.candidates
        self._candidates: list[Device] | None = None
        self._asked_s = 0.0
        self._place: tuple[int, Path] | None = None
        self._held: dict[int, Device] = {}
        self.obstacle = ""
        """Why the last try took nothing, for people."""

    @property
    def wanted(self) -> str:
        """What is asked for, for people."""
        named = self._request.devices
        of = "" if named is None else f" of {', '.join(map(str, named))}"
        return f"{self._request.count} device{'s' * (self._request.count > 1)}{of}"

    @property
    def devices(self) -> list[Device]:
        """What is held."""
        return sorted(self._held.values(), key=lambda device: device.index)

    @property
    def descriptors(self) -> list[int]:
        """What a child has to inherit so that the lease lasts as long as it lives."""
        return list(self._held)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that keep a process to the devices that are held; none for slots."""
        if not any(device.is_gpu for device in self.devices):
            return {}
        numbers = ",".join(str(device.index) for device in self.devices)
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": numbers}

    def try_take(self) -> bool:
        """Take what was asked for, if that is free and nobody was first; a machine that counts nothing has it at once.

        Raises:
            OSError: The folder of the locks can't be used.
        """
        now = time.monotonic()
        if self._candidates is None or now - self._asked_s >= LOOK_AGAIN_S:
            self._candidates, self._asked_s = self._ask(), now
        candidates = self._candidates
        if not candidates:
            return True
        with _turn(self._request.folder):
            first = self._who_waits_before(candidates)
            free, taken = ({}, []) if first else self._lock(candidates)
            if first or len(free) < self._request.count:
                for descriptor in free:
                    os.close(descriptor)
                self.obstacle = f"behind {first}, who waits longer" if first else "; ".join(taken)
                return False
            self._held = dict(list(free.items())[: self._request.count])
            for descriptor in free.keys() - self._held.keys():
                os.close(descriptor)
            for descriptor in self._held:
                _write(descriptor, {"holder": self._request.holder, "pid": os.getpid(), "since": time.time()})
            self._leave_queue()
        return True

    def release(self) -> None:
        """Give back what is held, and leave the queue. Children that inherited it still hold it."""
        for descriptor in self._held:
            os.close(descriptor)
        self._held = {}
        self._leave_queue()

    def _lock(self, candidates: Sequence[Device]) -> tuple[dict[int, Device], list[str]]:
        """Locks on all that is free, those that nobody uses first; and who has the others."""
        free: dict[int, Device] = {}
        taken = []
        for device in sorted(candidates, key=lambda device: device.used_share):
            path = self._request.folder / f"{device.name}.lock"
            descriptor = _open(path)
            if not _try_lock(descriptor):
                os.close(descriptor)
                taken.append(f"{device.label} is held by {_read(path).get('holder', 'somebody')}")
            elif device.used_share > IN_USE_SHARE:
                os.close(descriptor)
                taken.append(f"{device.label} is used by somebody without a lease ({device.used_share:.0%} of memory)")
            else:
                free[descriptor] = device
        return free, taken

    def _who_waits_before(self, candidates: Sequence[Device]) -> str:
        """Who waits longer for some of the same devices; takes a place in the queue where there is none yet."""
        folder = self._request.folder / "queue"
        _make_shared(folder)
        places = sorted(path for path in folder.iterdir() if path.name.isdecimal())
        if self._place is None:
            number = int(places[-1].name) + 1 if places else 0
            path = folder / f"{number:012d}"
            descriptor = _open(path)
            _try_lock(descriptor)
            names = [device.name for device in candidates]
            _write(descriptor, {"holder": self._request.holder, "devices": names})
            self._place = (descriptor, path)
        mine = {device.name for device in candidates}
        for path in places:
            waiting = _waiting(path) if path.name < self._place[1].name else {}
            if mine & set(waiting.get("devices", ())):
                return str(waiting.get("holder", "somebody"))
        return ""

    def _leave_queue(self) -> None:
        if self._place is not None:
            descriptor, path = self._place
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)
            self._place = None


def holders(folder: Path, devices: Sequence[Device]) -> dict[int, dict[str, Any]]:
    """Who holds which of the devices now, by number: `holder`, `pid`, `since` (seconds since 1970)."""
    found = {}
    for device in devices:
        path = folder / f"{device.name}.lock"
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if not _try_lock(descriptor):
                found[device.index] = _read(path)
            os.close(descriptor)
    return found


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One looks at a time, so that two that look at once do not find half of it taken, both."""
    _make_shared(folder)
    descriptor = _open(folder / "turn")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_shared(folder: Path) -> None:
    """Make a folder that other people's runs share. One that is there is left as it is.

    Anybody may have put a link in its place, where the folder above is everybody's: what that leads to keeps its mode.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return
    with contextlib.suppress(OSError):
        folder.chmod(0o1777)


def _open(path: Path) -> int:
    """A descriptor of a file that is there then, whoever made it."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # Without O_CREAT first: the kernel refuses it for other people's files in folders that all may write to.
        return os.open(path, flags)
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, 0o666)
        return descriptor


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _waiting(path: Path) -> dict[str, Any]:
    """What somebody who waits has written; empty, and the place is removed, if it waits no more."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return {}
    try:
        if not _try_lock(descriptor):
            return _read(path)
        with contextlib.suppress(OSError):
            path.unlink()
        return {}
    finally:
        os.close(descriptor)


def _write(descriptor: int, content: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(content).encode(), 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
