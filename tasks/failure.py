"""The digest of a failure: what failed first, of what class it is, what was probably behind it, what to do next.

    <store>/runs/<name>/<stage>/failure.json    for programs
    <store>/runs/<name>/<stage>/failure.txt     the same for people, with the last hundred lines

The error itself carries the gist, so that Prefect's state, the report and the terminal say it too.
"""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from configs.schema.run import RunConfig
from mcore.errors import LaunchError, PipelineError
from mcore.failure import Diagnosis, diagnose, first_failed_rank
from mcore.folders import write_durably
from mcore.launch import RECORD, tail_of
from mcore.supervise.record import read_record

FAILURE = "failure.json"
PAGE = "failure.txt"
AGAIN = "Run the same command again"


@dataclass(frozen=True, slots=True)
class Failure:
    """What is known of a failed attempt of a stage.

    Attributes:
        run: Name of the run.
        stage: Name of the stage.
        attempt: Its number, from 1.
        time: When it failed (UTC, ISO 8601).
        kind: Class of the failure (`mcore/failure.py`).
        cause: What was probably behind it; empty where the error says so itself.
        next: What to do.
        error: Class of the error.
        message: Its text.
        rank: The rank that failed first, if ranks did.
        exit_status: How the process ended, if that is known and no signal ended it.
        signal: Name of the signal that ended it.
        log: The file with all output.
        stacks: Folder with the stacks of processes that stood still.
        tail: The last lines of the log.
    """

    run: str
    stage: str
    attempt: int
    time: str
    kind: str
    cause: str
    next: str
    error: str
    message: str
    rank: int | None
    exit_status: int | None
    signal: str
    log: str
    stacks: str
    tail: tuple[str, ...]

    @property
    def advice(self) -> str:
        """Class, first rank, cause and what to do, in a line or two."""
        first = f", rank {self.rank} first" if self.rank is not None else ""
        ended = self.signal or (f"exit status {self.exit_status}" if self.exit_status is not None else "")
        head = f"{self.kind}{first}{f' ({ended})' if ended else ''}"
        return f"Class: {head}{f'; {self.cause}' if self.cause else ''}.\nNext: {self.next}."

    def page(self) -> str:
        """The whole digest as plain text."""
        stacks = [f"Stacks: {self.stacks}"] if self.stacks else []
        lines = [
            f"{self.run}: {self.stage} failed, attempt {self.attempt}, {self.time}",
            "",
            f"{self.error}: {self.message}",
            "",
            *self.advice.splitlines(),
            *stacks,
            f"Log: {self.log}",
            "",
            *self.tail,
        ]
        return "\n".join(lines) + "\n"


def record_failure(error: PipelineError, run: RunConfig, *, stage: str, attempt: int, log: Path) -> Failure:
    """Write the digest beside the stage's log, and put its gist into the error.

    Args:
        error: What ended the attempt.
        run: The run.
        stage: Name of the stage.
        attempt: Number of the attempt, from 1.
        log: The stage's log, which may not be there.
    """
    record = read_record(log.with_name(RECORD))
    diagnosis = diagnose(error, oom_kills=record.oom_kills if record else 0)
    tail = tail_of(log, record.log_offset if record else 0) if log.exists() else ""
    failed = first_failed_rank(tail)
    status = failed.exit_status if failed else error.returncode if isinstance(error, LaunchError) else None
    if status is None and record is not None and record.status:
        status = record.status
    name = signal_name(status)
    failure = Failure(
        run=run.name,
        stage=stage,
        attempt=attempt,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        kind=diagnosis.kind,
        cause=diagnosis.cause,
        next=next_step(diagnosis, error, run, stage, log),
        error=type(error).__name__,
        message=str(PipelineError(error.summary, error.problems)),
        rank=_reported_rank(log.with_name("error.json")) if failed is None else failed.rank,
        exit_status=None if name else status,
        signal=name,
        log=str(log),
        stacks=record.stacks if record else "",
        tail=tuple(tail.splitlines()),
    )
    error.advice, error.is_transient = failure.advice, diagnosis.kind == "transient"
    with suppress(OSError):  # a full disk, say, which may be the very failure: the error tells all the same
        write_durably(log.with_name(FAILURE), json.dumps(asdict(failure), indent=2))
        write_durably(log.with_name(PAGE), failure.page())
    return failure


def signal_name(status: int | None) -> str:
    """`SIGKILL` for -9 and 137; empty for what is no signal."""
    number = 0 if status is None else -status if status < 0 else status - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""


def next_step(diagnosis: Diagnosis, error: PipelineError, run: RunConfig, stage: str, log: Path) -> str:
    """What to do about a failure."""
    train = run.train
    match diagnosis.kind:
        case "transient":
            return f"{AGAIN}; it goes on from what is saved"
        case "out_of_memory" if stage == "train" and train.micro_batch_size > 1:
            return f"{AGAIN} with --set train.micro_batch_size={max(1, train.micro_batch_size // 2)}"
        case "out_of_memory" if stage == "train":
            return f"{AGAIN} with --set train.recompute_granularity=full, or on more processes"
        case "out_of_memory":
            return f"Give the machine more memory, or {AGAIN[0].lower()}{AGAIN[1:]} when less runs beside it"
        case "numerical":
            return f"{AGAIN} with --set train.lr={train.lr / 2:g}, or with train.bad_step_policy=rollback"
        case "gate":
            return f"mcore-flows report {run.name} --store {run.launch.store}"
        case "configuration" if "took longer than" in error.summary and (limit_s := run.launch.timeout_of(stage)):
            longer = json.dumps({stage: 2 * limit_s})
            return f"{AGAIN} with --set 'launch.stage_timeout_s={longer}'; it goes on from what is saved"
        case "configuration" | "data":
            return f"Correct what is named above, then {AGAIN[0].lower()}{AGAIN[1:]}"
        case _:
            return f"Read the log: less +G {log}"


def _reported_rank(error_file: Path) -> int | None:
    """The rank that wrote the error document, if one did."""
    try:
        rank = json.loads(error_file.read_text()).get("rank")
    except (OSError, ValueError, AttributeError):
        return None
    return rank if isinstance(rank, int) else None
