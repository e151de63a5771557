"""A machine of a run without a scheduler: it joins a start when it has its devices, and not before."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcore.devices import DeviceLease, Request
from mcore.launchers.member import join
from mcore.launchers.orders import Started, forget_started
from mcore.train.stop import StopRequest


@pytest.fixture
def held(tmp_path: Path) -> Iterator[DeviceLease]:
    """The only slot of the machine, held by another run."""
    lease = DeviceLease(Request(1, tmp_path / "locks", "run other, train", None, 1))
    assert lease.try_take()
    yield lease
    lease.release()


def said(capfd: pytest.CaptureFixture[str], text: str) -> str:
    """Everything told so far, once a text is among it."""
    told = ""
    for _ in range(300):
        told += capfd.readouterr().err
        if text in told:
            return told
        time.sleep(0.1)
    raise AssertionError(told)


def test_it_waits_for_its_devices_and_then_joins(
    tmp_path: Path, held: DeviceLease, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, stop, complete = tmp_path / "job", StopRequest(), threading.Event()
    folder.mkdir()
    Started("1", "first").write(folder)
    mine = Request(1, tmp_path / "locks", "run mine, machine 1", None, 1)
    ended: list[int] = []
    machine = threading.Thread(target=lambda: ended.append(join(folder, 1, stop, complete.is_set, mine)))
    machine.start()
    said(capfd, "waiting for 1 device: slot 0 is held by run other, train")
    forget_started(folder)  # nobody waits for it any more; the next start does
    Started("2", "second").write(folder)
    held.release()
    # There are no orders in this folder, so its share fails at once; the lease is given back behind it.
    told = said(capfd, "its share of start second ended with exit status 2")
    assert "on slot 0" in told and "start first ended" not in told
    assert held.try_take()
    complete.set()
    machine.join(timeout=60)
    assert ended == [0]
