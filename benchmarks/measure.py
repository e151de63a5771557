"""A command's time, its processor time, and the peak memory of its whole process tree."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from mcore.supervise import descendants

SAMPLE_EVERY_S = 0.05
_PSS = re.compile(rb"^Pss(_Anon|_Shmem)?:\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a command.

    Attributes:
        seconds: From its start to its end, on the clock.
        cpu_s: Processor seconds of all its processes, system calls among them.
        peak_bytes: Largest sum of its processes' proportional set sizes (PSS): a page that several share counts once.
        peak_own_bytes: The same without pages of files, which the kernel may take back: libraries, mapped weights.
        stdout: What it printed.
    """

    seconds: float
    cpu_s: float
    peak_bytes: int
    peak_own_bytes: int
    stdout: str


def run(command: Sequence[object], then_sync: Path | None = None) -> Run:
    """Run a command to its end.

    Args:
        command: What to run.
        then_sync: A folder that must be on the disk before the clock stops.

    Raises:
        RuntimeError: It failed; with its last output.
    """
    peaks = [0, 0]
    ended = threading.Event()
    with tempfile.TemporaryFile() as errors:
        start = monotonic()
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=errors)
        sampler = threading.Thread(target=_sample, args=(process.pid, peaks, ended))
        sampler.start()
        assert process.stdout is not None
        stdout = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if then_sync is not None:
            for path in (*then_sync.rglob("*"), then_sync):
                sync(path)
        seconds = monotonic() - start
        ended.set()
        sampler.join()
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{command}: {errors.read()[-3000:].decode(errors='replace')}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peaks[0], peaks[1], stdout)


def _sample(root: int, peaks: list[int], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_EVERY_S):
        total = own = 0
        for pid in {root} | descendants(root):
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_bytes()
            except OSError:
                continue  # it has ended
            sizes = {kind: int(kilobytes) * 1024 for kind, kilobytes in _PSS.findall(rollup)}
            total += sizes.get(b"", 0)
            own += sizes.get(b"_Anon", 0) + sizes.get(b"_Shmem", 0)
        peaks[:] = max(peaks[0], total), max(peaks[1], own)


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget(folder: Path) -> None:
    """Have the kernel drop a folder's files from its page cache, as far as it is willing to."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def median(runs: Sequence[Run]) -> Run:
    """The run with the median time, with the largest memory of all."""
    ordered = sorted(runs, key=lambda run: run.seconds)
    middle = ordered[(len(ordered) - 1) // 2]
    return Run(
        statistics.median(run.seconds for run in runs),
        middle.cpu_s,
        max(run.peak_bytes for run in runs),
        max(run.peak_own_bytes for run in runs),
        middle.stdout,
    )
