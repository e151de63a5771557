"""Several machines without a scheduler: this one is the first, `mcore-flows node` waits on the others.

They see the orders in the store and join. Whether they still live is told by their supervisors' records: one whose
record says that it failed, or has not changed for a minute, is lost, and what is left of the job is ended, as it would
wait for it for ever.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from mcore.errors import EXIT_RESUME
from mcore.launchers.orders import Orders, Started
from mcore.launchers.protocol import JobState
from mcore.supervise.processes import PR_SET_PDEATHSIG, prctl
from mcore.supervise.record import LOST_AFTER_S, Record, read_record

LAST_WORDS_S = 5.0
"""Seconds for an error to be told by those whom it came from, before the machine that it reached first is believed."""


class LocalLauncher:
    """The job of which this machine is the first.

    Args:
        orders: What it is to do.
    """

    outlives_flow = False
    poll_s = 0.5

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._start = uuid.uuid4().hex[:8]
        self._folder = orders.start_folder(self._start)
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, tuple[float, float]] = {}
        self._failed_s: float | None = None

    def start_or_attach(self) -> str:
        orders = self._orders
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mcore.launchers", "node", str(orders.path), "--node-rank", "0",
             "--start", self._start],
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )  # fmt: skip
        Started("local", self._start).write(orders.folder)  # the others see this and join
        others = ", ".join(map(str, range(1, orders.nnodes)))
        return f"started machine 0 of {orders.nnodes} at {orders.rdzv_endpoint}; waiting for {others}"

    def poll(self) -> JobState:
        assert self._process is not None
        status = self._process.poll()
        if status == 0:
            return JobState("done", status=0)
        if status == EXIT_RESUME:
            return JobState("stopped", status=status)
        lost = self._lost()
        if status is None and lost:
            return self._after_last_words(JobState("lost", lost))
        if status is None:
            return JobState("running")
        if absent := self._absent():
            return JobState("lost", f"{absent} did not join within {self._orders.join_timeout_s:g} s", status)
        return self._after_last_words(JobState("lost", lost, status) if lost else JobState("failed", status=status))

    def _after_last_words(self, state: JobState) -> JobState:
        now = time.monotonic()
        self._failed_s = self._failed_s or now
        return state if now - self._failed_s >= LAST_WORDS_S else JobState("running", "ending")

    def _records(self) -> dict[int, Record]:
        records = {rank: read_record(self._folder / f"node-{rank}.json") for rank in range(1, self._orders.nnodes)}
        return {rank: record for rank, record in records.items() if record is not None}

    def _absent(self) -> str:
        """The machines that never came."""
        there = self._records()
        return ", ".join(f"machine {rank}" for rank in range(1, self._orders.nnodes) if rank not in there)

    def _lost(self) -> str:
        """What became of the other machines that are not at work; empty if all are, or have ended well."""
        now, found = time.monotonic(), []
        for rank, record in self._records().items():
            who = f"machine {rank} ({record.host})"
            heartbeat, seen_s = self._seen.get(rank, (record.heartbeat, now))
            # Seen to change by our own clock: theirs may be another.
            self._seen[rank] = (heartbeat, seen_s) if heartbeat == record.heartbeat else (record.heartbeat, now)
            if record.status is not None:
                found += [f"{who} ended with exit status {record.status}"] if record.status != 0 else []
            elif now - self._seen[rank][1] >= LOST_AFTER_S:
                found.append(f"{who} has given no sign of life for {LOST_AFTER_S:g} s")
        return ", ".join(found)

    def ask_to_end(self) -> None:
        assert self._process is not None
        self._process.terminate()

    def end(self) -> None:
        """Ask again; the supervisor above kills what is left."""
        self.ask_to_end()

    def logs(self) -> list[Path]:
        return sorted(self._folder.glob("node-*.log"))

    def folder(self) -> Path | None:
        return self._folder


def _end_with_parent() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
