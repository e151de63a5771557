"""The devices of a command in the terminal, held as the supervisor holds a stage's: whoever comes later waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mcore.devices import DeviceLease, Request
from mcore.errors import InfrastructureError, Problem
from mcore.progress import say

POLL_S = 0.5


@contextmanager
def held_devices(request: Request) -> Iterator[DeviceLease]:
    """Hold devices for the block; waits for them, and tells for whom. Ctrl-C ends the wait.

    Args:
        request: What is asked for; a machine that counts nothing has it at once.

    Raises:
        InfrastructureError: The folder of the locks can't be used.
    """
    lease = DeviceLease(request)
    try:
        _wait_for(lease, request)
        yield lease
    finally:
        lease.release()


def _wait_for(lease: DeviceLease, request: Request) -> None:
    told = ""
    try:
        while not lease.try_take():
            if lease.obstacle != told:
                told = lease.obstacle
                say(f"waiting for {lease.wanted}: {told}")
            time.sleep(POLL_S)
    except OSError as exc:
        problem = Problem(str(request.folder), "a folder for locks (launch.device_locks)", str(exc))
        raise InfrastructureError("no device can be leased", [problem]) from exc
    if lease.devices:
        say(f"on {', '.join(device.label for device in lease.devices)}")
