"""Whether the processes of a training would find each other: tried, in child processes, before anything is started."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mcore import launch
from mcore.devices import DeviceLease, Request
from mcore.errors import PipelineError, Problem

TIMEOUT_S = 90.0
"""Seconds for all of it: importing torch takes several, and NCCL on eight GPUs some more."""
FIX = "NCCL_DEBUG=INFO tells more; name the interface in launch.socket_ifname; give a container --ipc=host."


def loopback_problems(request: Request, say: Callable[[str], None], *, timeout_s: float = TIMEOUT_S) -> list[Problem]:
    """Let as many processes as are asked for devices do an all-reduce.

    Where others hold the devices now it is left out, and said: their training must not be disturbed, and this run waits
    for them.

    Args:
        request: The devices of the training.
        say: Takes a line for the log.
        timeout_s: Seconds for all of it.
    """
    lease = DeviceLease(request)
    try:
        if not lease.try_take():
            say(f"the processes' connection is not tried: {lease.obstacle}")
            return []
        with tempfile.TemporaryDirectory(prefix="loopback-") as folder:
            log = Path(folder) / "loopback.log"
            try:
                launch.run(
                    [sys.executable, "-m", "mcore.loopback", str(request.count), str(timeout_s)],
                    log_path=log, error_file=Path(folder) / "error.json", env=lease.environment,
                    timeout_s=timeout_s + 10, grace_s=1.0,
                )  # fmt: skip
            except PipelineError as error:
                found = "; ".join([error.summary, *map(str, error.problems)])
                last = launch.tail_of(log).strip().splitlines()[-1:]
                return [Problem(f"an all-reduce between {request.count} processes", "the sum", found, _fix(last))]
        return []
    finally:
        lease.release()


def _fix(last: list[str]) -> str:
    return f"The last line was: {last[0]}. {FIX}" if last else FIX
