"""Leases of devices, with real processes: all or nothing, first come first served, and nothing left by a kill -9."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mcore.devices import Device, DeviceLease, Request, holders
from tests.unit.mcore.test_launch import wait_until

HOLD = """
import sys, time
from mcore.devices import DeviceLease, Request
lease = DeviceLease(Request.from_json(sys.argv[1]))
while not lease.try_take():
    print(lease.obstacle, flush=True)
    time.sleep(0.02)
print("held", *(device.index for device in lease.devices), flush=True)
time.sleep(600)
"""


@pytest.fixture
def ask(tmp_path: Path):
    """A request for slots of this test's own machine of four."""

    def request(
        count: int, holder: str = "somebody", devices: tuple[int, ...] | None = None, slots: int = 4
    ) -> Request:
        return Request(count, tmp_path / "locks", holder, devices, slots)

    return request


def indices(lease: DeviceLease) -> list[int]:
    return [device.index for device in lease.devices]


def test_all_or_nothing(ask) -> None:
    first, second, third = (
        DeviceLease(ask(3, "first")),
        DeviceLease(ask(2, "second")),
        DeviceLease(ask(1, "third", devices=(3,))),
    )
    assert first.try_take() and indices(first) == [0, 1, 2]
    assert not second.try_take() and "slot 0 is held by first" in second.obstacle
    assert indices(second) == []
    # The fourth slot is free, but whoever waits longer could use it.
    assert not third.try_take() and third.obstacle == "behind second, who waits longer"
    first.release()
    assert second.try_take() and third.try_take()
    assert set(indices(second)).isdisjoint(indices(third))


def test_those_who_ask_for_others_pass_by(ask) -> None:
    first, second, third = (
        DeviceLease(ask(1, name, devices=(number,))) for name, number in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.try_take()
    assert not second.try_take()
    assert third.try_take() and indices(third) == [1]


def test_who_no_longer_waits_is_in_nobodys_way(ask) -> None:
    first, second, third = DeviceLease(ask(4)), DeviceLease(ask(2)), DeviceLease(ask(1))
    assert first.try_take() and not second.try_take() and not third.try_take()
    second.release()
    first.release()
    assert third.try_take()


def test_holders_are_told(ask) -> None:
    request = ask(2, "run tiny, train", devices=(1, 3))
    lease = DeviceLease(request)
    assert lease.try_take()
    devices = [Device(number, f"slot-{number}", False) for number in range(4)]
    found = holders(request.folder, devices)
    assert sorted(found) == [1, 3]
    assert found[1]["holder"] == "run tiny, train" and found[1]["pid"] == os.getpid()
    assert abs(found[1]["since"] - time.time()) < 60
    lease.release()
    assert holders(request.folder, devices) == {}


def test_nothing_is_counted_where_there_is_nothing_to_count(ask, tmp_path: Path) -> None:
    lease = DeviceLease(ask(8, slots=None), candidates=list)
    assert lease.try_take() and lease.devices == [] and lease.environment == {}
    assert not (tmp_path / "locks").exists()


def gpus(*used: float) -> list[Device]:
    return [Device(number, f"GPU-{number:08d}", True, share) for number, share in enumerate(used)]


def test_gpus_are_made_visible_by_number_and_locked_by_uuid(ask, tmp_path: Path) -> None:
    lease = DeviceLease(ask(2), candidates=lambda: gpus(0.02, 0.0, 0.0, 0.01))
    assert lease.try_take()
    assert lease.environment == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1,2"}
    assert {path.name for path in (tmp_path / "locks").glob("GPU-*")} >= {"GPU-00000001.lock", "GPU-00000002.lock"}
    # A container that numbers the same GPUs otherwise gets the others.
    renumbered = [Device(9 - device.index, device.name, True, device.used_share) for device in gpus(0, 0, 0, 0)]
    other = DeviceLease(ask(2), candidates=lambda: renumbered)
    assert other.try_take() and {device.name for device in other.devices} == {"GPU-00000000", "GPU-00000003"}


def test_a_gpu_that_somebody_uses_without_asking_is_not_free(ask) -> None:
    lease = DeviceLease(ask(2), candidates=lambda: gpus(0.0, 0.6))
    assert not lease.try_take()
    assert lease.obstacle == "GPU 1 is used by somebody without a lease (60% of memory)"


def test_a_kill_frees_what_was_held_and_the_place_in_the_queue(ask) -> None:
    request = ask(2, "the one that is killed", slots=2)

    def start(request: Request) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-S", "-c", HOLD, request.to_json()], stdout=subprocess.PIPE, text=True
        )

    with start(request) as holder, start(ask(2, "waits", slots=2)) as waiter:
        try:
            for process in (holder, waiter):
                process.line = process.stdout.readline()  # one of them was first
            first, second = sorted((holder, waiter), key=lambda process: not process.line.startswith("held"))
            assert first.line == "held 0 1\n" and "slot 0 is held by" in second.line
            late = DeviceLease(ask(1, "late", slots=2))
            assert not late.try_take() and "waits longer" in late.obstacle
            second.send_signal(signal.SIGKILL)
            second.wait()
            assert not late.try_take() and "is held by" in late.obstacle
            first.send_signal(signal.SIGKILL)
            first.wait()
            assert late.try_take()
        finally:
            holder.kill()
            waiter.kill()


def test_a_child_that_inherited_it_goes_on_holding(ask) -> None:
    request = ask(1, slots=1)
    lease = DeviceLease(request)
    assert lease.try_take()
    child = subprocess.Popen(["sleep", "600"], pass_fds=lease.descriptors)
    lease.release()
    other = DeviceLease(request)
    assert not other.try_take()
    child.kill()
    child.wait()
    assert other.try_take()


def test_a_link_in_the_place_of_the_locks_opens_nobodys_folder(tmp_path: Path) -> None:
    """Anybody can put one into /dev/shm before the first run does."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (tmp_path / "locks").symlink_to(private)
    assert DeviceLease(Request(1, tmp_path / "locks", "somebody", None, 4)).try_take()
    assert private.stat().st_mode & 0o7777 == 0o700
    assert DeviceLease(Request(1, tmp_path / "new" / "locks", "somebody", None, 4)).try_take()
    assert (tmp_path / "new" / "locks").stat().st_mode & 0o7777 == 0o1777


def test_many_at_once_never_share(ask) -> None:
    """Twelve threads of requests for one to three of four slots: each gets its turn, and no slot two holders."""
    in_use: dict[int, str] = {}
    guard = threading.Lock()
    shared, done = [], []

    def work(name: str, count: int) -> None:
        lease = DeviceLease(ask(count, name))
        while not lease.try_take():
            time.sleep(0.002)
        mine = indices(lease)
        with guard:
            shared.extend(number for number in mine if number in in_use)
            in_use.update(dict.fromkeys(mine, name))
        time.sleep(0.01)
        with guard:
            for number in mine:
                del in_use[number]
        lease.release()
        done.append(name)

    threads = [threading.Thread(target=work, args=(f"{number}", 1 + number % 3)) for number in range(12)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(done) == len(threads), 30)
    assert not shared


def test_a_request_crosses_a_command_line() -> None:
    for request in (Request(2, Path("/locks"), "run 'x', train", (0, 3), 4), Request(1, Path("/locks"), "y")):
        assert Request.from_json(request.to_json()) == request
        json.loads(request.to_json())
