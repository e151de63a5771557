"""A machine that is told by hand that it belongs to a run: it joins each start of its job, until that is complete.

The first machine, where the flow is, says in the store when it starts. This one needs nothing else of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mcore.devices import DeviceLease, Request
from mcore.launchers.orders import FILE, read_started
from mcore.progress import say
from mcore.train.stop import StopRequest

POLL_S = 0.5
OVER_AFTER_S = 15.0
"""Seconds that this machine's share goes on when the job has ended elsewhere: it may be about to end by itself."""


def join(folder: Path, rank: int, stop: StopRequest, is_complete: Callable[[], bool], devices: Request) -> int:
    """Take part in every start of a job.

    Args:
        folder: The job's folder.
        rank: Number of this machine, from 1.
        stop: Says whether this process was asked to end.
        is_complete: Whether there is nothing left to do.
        devices: Devices of this machine that each start needs: waited for, and held until its last process has ended.

    Returns:
        0 when the work is complete, 75 if this machine was asked to leave before.
    """
    joined = ""
    say(f"machine {rank} waits for the run to start training")
    while not stop.received and not is_complete():
        started = read_started(folder)
        if started is None or started.start == joined:
            time.sleep(POLL_S)
            continue
        joined = started.start
        say(f"machine {rank} joins start {joined}")
        lease = DeviceLease(devices)
        try:
            if not _get(lease, folder, joined, stop):
                continue
            status = _take_part(folder, rank, joined, stop, lease)
        finally:
            lease.release()
        log = folder / f"start-{joined}" / f"node-{rank}.log"
        say(f"machine {rank}: its share of start {joined} ended with exit status {status}; log: {log}")
    return 0 if is_complete() else 75


def _get(lease: DeviceLease, folder: Path, start: str, stop: StopRequest) -> bool:
    """Wait for devices, as long as the start waits for this machine; False if it does no more."""
    told = ""
    while not lease.try_take():
        if lease.obstacle != told:
            told = lease.obstacle
            say(f"waiting for {lease.wanted}: {told}")
        time.sleep(POLL_S)
        started = read_started(folder)
        if stop.received or started is None or started.start != start:
            return False
    if lease.devices:
        say(f"on {', '.join(device.label for device in lease.devices)}")
    return True


def _take_part(folder: Path, rank: int, start: str, stop: StopRequest, lease: DeviceLease) -> int:
    """Run this machine's share, and end it when the job is over."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mcore.launchers",
            "node",
            str(folder / FILE),
            "--node-rank",
            str(rank),
            "--start",
            start,
        ],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is handed on once
        env={**os.environ, **lease.environment},
        pass_fds=lease.descriptors,  # so it lasts if this process is killed
    )
    is_asked = False
    over_since_s: float | None = None
    while True:
        try:
            return process.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        started = read_started(folder)
        if started is not None and started.start == start:
            over_since_s = None
        elif over_since_s is None:
            over_since_s = now
        is_over = over_since_s is not None and now - over_since_s >= OVER_AFTER_S
        if (stop.received or is_over) and not is_asked:
            process.terminate()  # its supervisor gives it the grace, then ends it
            is_asked = True
