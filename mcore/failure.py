"""What kind of failure an error is, and what was probably behind it, told from the error and the end of its log.

    transient       lost to something outside the work: a killed process, the network, a GPU, a file server
    out_of_memory   host or GPU memory did not suffice
    configuration   what was set, or what is installed, can't work here
    data            rows that can't be used
    numerical       a loss or a gradient that is not finite, or a spike
    gate            a gate said no: nothing failed but the model
    internal        anything else: a defect, or what nobody has met yet

Only what is transient is worth the same attempt again.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mcore.errors import (
    DataError,
    GateError,
    InfrastructureError,
    InputError,
    LaunchError,
    PipelineError,
    TrainingError,
)

Kind = Literal["transient", "out_of_memory", "configuration", "data", "numerical", "gate", "internal"]

# fmt: off
SIGNS: tuple[tuple[str, Kind, str], ...] = (
    (r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"
     r"|No available memory for the cache blocks",
     "out_of_memory", "the GPU's memory did not suffice"),
    (r"\bMemoryError\b|can't allocate memory|Cannot allocate memory|oom-kill",
     "out_of_memory", "the machine's memory did not suffice"),
    (r"No space left on device|Disk quota exceeded",
     "configuration", "the disk is full"),
    (r"Too many open files",
     "configuration", "the limit of open files is too low (ulimit -n)"),
    (r"no kernel image is available|CUDA driver version is insufficient|No CUDA GPUs are available"
     r"|\bModuleNotFoundError\b|\bImportError\b",
     "configuration", "what is installed does not fit this machine"),
    (r"uncorrectable ECC|fallen off the bus|CUDA error: (?:unspecified launch failure|an illegal instruction)",
     "transient", "a GPU failed; if the same one does again, take it out"),
    (r"Watchdog caught collective operation timeout|ncclRemoteError|ncclSystemError|ncclInternalError|NCCL error"
     r"|DistBackendError",
     "transient", "the processes lost each other (NCCL)"),
    (r"Connection reset by peer|Connection closed by peer|Connection refused|Socket Timeout|Broken pipe|timed out"
     r"|RendezvousConnectionError|does not reach machine|Address already in use|Temporary failure in name resolution"
     r"|(?:500|502|503|504|429) (?:Server|Client) Error",
     "transient", "the network, or a process at its other end, was lost"),
    (r"Stale file handle|Input/output error|Transport endpoint is not connected",
     "transient", "the file system failed"),
)
# fmt: on
"""Signs in an exception's text or the last lines of a log, what they mean, and what was probably behind them."""

_NUMBERS = re.compile(r"\bloss\b|\bgrad|finite|spike|\bnan\b", re.IGNORECASE)
_RANK = re.compile(r"^\s*rank\s*: (\d+) \(local_rank: \d+\)\s*^\s*exitcode\s*: (-?\d+) \(pid: \d+\)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What an error was.

    Attributes:
        kind: Its class.
        cause: What was probably behind it; empty where the error says so itself.
    """

    kind: Kind
    cause: str = ""


@dataclass(frozen=True, slots=True)
class FailedRank:
    """A rank that torchrun saw fail, and its exit status; negative is the signal that ended it."""

    rank: int
    exit_status: int


def diagnose(error: BaseException, *, oom_kills: int = 0) -> Diagnosis:
    """The class of an error, and its suspected cause.

    Args:
        error: What ended a stage.
        oom_kills: Processes that the kernel killed for want of memory while it ran.
    """
    if isinstance(error, DataError):
        return Diagnosis("data")
    if isinstance(error, InputError):
        return Diagnosis("configuration")
    if isinstance(error, GateError):
        return Diagnosis("gate")
    if isinstance(error, TrainingError):
        return Diagnosis("numerical" if _NUMBERS.search(error.summary) else "internal")
    killed = isinstance(error, LaunchError) and error.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}
    if killed and oom_kills:
        return Diagnosis("out_of_memory", "the kernel killed a process for want of the machine's memory")
    if isinstance(error, LaunchError) and "took longer than" in error.summary:
        return Diagnosis("configuration", "the time limit is too short, or the work is stuck")
    # An error that a process reported itself has its reason in its own words; the log around it may tell of others.
    words = str(PipelineError(error.summary, error.problems)) if isinstance(error, PipelineError) else str(error)
    text = f"{words}\n{error.tail}" if isinstance(error, LaunchError) else words
    for sign, kind, cause in SIGNS:
        if re.search(sign, text):
            return Diagnosis(kind, cause)
    if isinstance(error, InfrastructureError):
        return Diagnosis("transient", _why_lost(error))
    return Diagnosis("internal")


def _why_lost(error: InfrastructureError) -> str:
    if "stood still" in error.summary:
        return "a process hangs; the stacks beside the log say where each one stood"
    if error.returncode == -signal.SIGKILL:
        return "somebody killed a process, or the machine's memory did not suffice"
    return "a process was ended from outside"


def failed_ranks(log: str) -> Iterator[FailedRank]:
    """Ranks that torchrun's account in a log names, the one that it takes for the first to fail at the head."""
    others, _, root = log.partition("Root Cause (first observed failure)")
    for part in (root, others):
        for rank, status in _RANK.findall(part):
            yield FailedRank(int(rank), int(status))


def first_failed_rank(log: str) -> FailedRank | None:
    """The rank that began it; one that was only asked to end because of another is not it, if there is any other."""
    ranks = list(failed_ranks(log))
    by_themselves = [failed for failed in ranks if failed.exit_status != -signal.SIGTERM]
    return next(iter(by_themselves or ranks), None)
