"""Where the flow is: have one job, hand on what it says, tell how it ended, end it when asked to.

The supervisor above keeps its duties: it ends this process when the flow's time is up or the run is cancelled, and then
the job is ended. If the flow is killed, a job of a scheduler goes on by itself and the next flow attaches.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mcore.child import ERROR_FILE_VARIABLE
from mcore.errors import (
    EXIT_RESUME,
    InfrastructureError,
    LaunchError,
    PipelineError,
    Problem,
    StoppedError,
    error_from_json,
)
from mcore.launch import TAIL_BYTES
from mcore.launchers.kubernetes import KubernetesLauncher
from mcore.launchers.local import LocalLauncher
from mcore.launchers.node import UNREACHABLE
from mcore.launchers.orders import RECORD_VARIABLE, Orders, forget_started
from mcore.launchers.protocol import JobState, Launcher
from mcore.launchers.slurm import SlurmLauncher
from mcore.progress import say
from mcore.supervise.record import read_record
from mcore.train.stop import StopRequest

TICK_S = 0.2
END_BEFORE_S = 10.0
"""Seconds before the end of the grace in which a job that did not end by itself is ended."""
LAUNCHERS: dict[str, Callable[[Orders], Launcher]] = {
    "local": LocalLauncher,
    "slurm": SlurmLauncher,
    "kubernetes": KubernetesLauncher,
}


class Tail:
    """Writes to standard output what is new in a job's files, whole lines at a time."""

    def __init__(self) -> None:
        self._offsets: dict[Path, int] = {}

    def read(self, paths: list[Path], *, final: bool = False) -> None:
        """Hand on the new lines; `final` also a last one without an end."""
        for path in paths:
            if path not in self._offsets:  # of a job that was attached to, the end
                self._offsets[path] = max(0, path.stat().st_size - TAIL_BYTES)
            with path.open("rb") as file:
                file.seek(self._offsets[path])
                new = file.read()
            whole = new if final else new[: new.rfind(b"\n") + 1]
            self._offsets[path] += len(whole)
            sys.stdout.buffer.write(whole)
        sys.stdout.flush()


def follow(orders: Orders, stop: StopRequest) -> int:
    """Watch the job of some orders until it ends.

    Args:
        orders: What it is to do.
        stop: Says whether this process was asked to end.

    Returns:
        0 if the job is complete, else what `mcore.launch` is to make of it, with the error document written.

    Raises:
        PipelineError: How the job ended, where none of its processes told.
    """
    launcher: Launcher = LAUNCHERS[orders.launcher](orders)
    say(launcher.start_or_attach())
    tail = Tail()
    told = ""
    asked_s = end_s = None
    patience_s = max(orders.grace_s - END_BEFORE_S, orders.grace_s / 2)
    next_s = 0.0
    while True:
        now = time.monotonic()
        if stop.received and asked_s is None:
            if launcher.outlives_flow and _is_abandoned():
                say("the flow is gone; the job goes on, and the next flow attaches to it")
                return EXIT_RESUME
            say("asking the job to end")
            launcher.ask_to_end()
            asked_s = now
        if asked_s is not None and end_s is None and now - asked_s >= patience_s:
            say("the job has not ended by itself and is ended")
            launcher.end()
            end_s = now
        if now >= next_s:
            state = launcher.poll()
            next_s = now + min(launcher.poll_s, 1.0 if asked_s is not None else launcher.poll_s)
            if str(state) != told:
                told = str(state)
                say(f"job: {told}")
            tail.read(launcher.logs(), final=state.has_ended)
            if state.has_ended:
                return _outcome(orders, launcher, state, was_asked=asked_s is not None)
        time.sleep(TICK_S)


def _is_abandoned() -> bool:
    """Whether the supervisor above ends this process as its flow is gone, and not because somebody asked for it."""
    record = read_record(Path(os.environ.get(RECORD_VARIABLE, "")))
    return record is not None and record.cause == "abandoned"


def _outcome(orders: Orders, launcher: Launcher, state: JobState, *, was_asked: bool) -> int:
    """What the end of a job means.

    Raises:
        PipelineError: It ended otherwise than well, and none of its processes said why.
    """
    forget_started(orders.folder)
    if state.phase == "done":
        return 0
    folder = launcher.folder()
    reported = _reported(folder / "error.json") if folder is not None else None
    # Who lost the others reports a defect of its own, as a process that stands alone can't know better.
    if folder is not None and (cut_off := sorted(path.read_text() for path in folder.glob(f"{UNREACHABLE}*"))):
        problems = [Problem(reported.summary), *reported.problems] if reported is not None else []
        raise InfrastructureError(f"the job was lost: {', '.join(cut_off)}", problems, log_path=folder)
    stands_alone = state.phase == "lost" and type(reported) is PipelineError
    # Whoever cancels the job of a run does not want it back, although its processes saved.
    was_cancelled = state.phase == "cancelled" and not was_asked
    if reported is not None and not stands_alone and not was_cancelled:
        assert folder is not None
        if target := os.environ.get(ERROR_FILE_VARIABLE):
            shutil.copyfile(folder / "error.json", target)
        return reported.exit_status
    problems = list(reported.problems) if reported is not None and not was_cancelled else []
    cls, summary = _in_words(state, was_asked=was_asked)
    log_path = str(folder) if folder is not None else None
    raise cls(summary, problems, returncode=state.status, log_path=log_path)


def _in_words(state: JobState, *, was_asked: bool) -> tuple[type[LaunchError], str]:
    """Class and summary of the error that a job's end is."""
    signal_number = state.status - 128 if state.status is not None and state.status > 128 else 0
    match state.phase:
        case "stopped":
            return StoppedError, f"the job left before its end: {state.reason or 'asked to'}"
        case "cancelled" if was_asked:
            return StoppedError, "the job was ended as this run was asked to"
        case "cancelled":
            return LaunchError, f"the job was cancelled by somebody else than this run: {state.reason}"
        case "out_of_memory":
            return InfrastructureError, f"the job was killed for want of memory (oom-kill): {state.reason}"
        case "lost":
            return InfrastructureError, f"the job was lost: {state.reason}"
        case _ if signal_number:
            return InfrastructureError, f"the job was ended by signal {signal_number}"
        case _:
            return LaunchError, f"the job failed: {state.reason or f'exit status {state.status}'}"


def _reported(error_file: Path) -> PipelineError | None:
    try:
        return error_from_json(error_file.read_text())
    except (OSError, ValueError):
        return None
