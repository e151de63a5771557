"""Slurm: one job of `launch.nnodes` nodes with a task each. Only its own programs are used, on the flow's machine.

A job is known by its name, which is made of the key of what it makes, so that it is found even if the flow was killed
between `sbatch` and the next line; and as Slurm starts no second job of that name before the first has ended
(`--dependency=singleton`), the folder has one writer. A job that Slurm starts again (a preemption, a node that failed)
keeps its number and resumes.
"""

from __future__ import annotations

import re
import shlex
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from configs.schema.cluster import SAFE_PATH, SlurmConfig
from mcore.errors import EXIT_RESUME, ConfigError, LaunchError, Problem
from mcore.folders import write_durably
from mcore.launchers.orders import Orders, Started, forget_started, read_started
from mcore.launchers.programs import ask
from mcore.launchers.protocol import JobState, Phase

SCRIPT = "job.sh"
FORGOTTEN_AFTER_S = 120.0
"""Seconds in which nobody knows a job after which it counts as lost: accounting may be behind, or not be kept."""

PHASES: dict[str, Phase] = {
    "PENDING": "waiting",
    "CONFIGURING": "waiting",
    "REQUEUED": "waiting",
    "REQUEUE_FED": "waiting",
    "REQUEUE_HOLD": "waiting",
    "RESV_DEL_HOLD": "waiting",
    "SPECIAL_EXIT": "waiting",
    "RUNNING": "running",
    "COMPLETING": "running",
    "RESIZING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "STOPPED": "running",
    "SUSPENDED": "running",
    "COMPLETED": "done",
    "FAILED": "failed",
    "TIMEOUT": "stopped",
    "DEADLINE": "failed",
    "CANCELLED": "cancelled",
    "OUT_OF_MEMORY": "out_of_memory",
    "NODE_FAIL": "lost",
    "BOOT_FAIL": "lost",
    "PREEMPTED": "lost",
    "REVOKED": "lost",
    "LAUNCH_FAILED": "lost",
    "RECONFIG_FAIL": "lost",
}
"""Slurm's job states, and what they mean here. Source: squeue(1), JOB STATE CODES, Slurm 24.05."""


def render_script(orders: Orders) -> str:
    """The batch script of a job.

    Raises:
        ConfigError: A path has a character in it that a batch script would read otherwise.
    """
    import jinja2  # a tenth of a second that only this takes

    problems = [
        Problem(str(path), "a path of letters, digits and . _ - + = @ , /", "another character")
        for path in (orders.folder, orders.cwd)
        if not re.fullmatch(SAFE_PATH, str(path))
    ]
    if problems:
        raise ConfigError("the batch script can't be written", problems)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quoted"] = lambda value: shlex.quote(str(value))
    text = files("mcore.launchers").joinpath("slurm.sh.jinja").read_text()
    words: dict[str, Any] = {"orders": orders, "slurm": orders.slurm or SlurmConfig(), "grace_s": round(orders.grace_s)}
    return environment.from_string(text).render(words)


class SlurmLauncher:
    """The job of some orders.

    Args:
        orders: What it is to do.
    """

    outlives_flow = True

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self.poll_s = (orders.slurm or SlurmConfig()).poll_s
        self._job = ""
        self._last = JobState("waiting")
        self._known_s = time.monotonic()

    def start_or_attach(self) -> str:
        if job := self._living():
            self._job = job
            return f"attached to Slurm job {job}"
        if (started := read_started(self._orders.folder)) is not None:
            self._job = started.job
            if self.poll().phase == "done" and self._orders.done_file.exists():
                return f"Slurm job {started.job} had ended meanwhile"
        forget_started(self._orders.folder)
        script = self._orders.folder / SCRIPT
        write_durably(script, render_script(self._orders))
        answer = ask(["sbatch", "--parsable", str(script)])
        job = answer.out.strip().partition(";")[0]  # with the cluster's name behind it, where there are several
        if answer.status != 0 or not job.isdigit():
            raise LaunchError(f"sbatch refused {script}: {answer.words}", returncode=answer.status)
        self._job, self._last, self._known_s = job, JobState("waiting"), time.monotonic()
        Started(job, job).write(self._orders.folder)
        return f"submitted Slurm job {job}"

    def _living(self) -> str:
        """The number of the job with our name that is queued or runs; empty if there is none.

        Raises:
            LaunchError: Slurm does not answer, so that nobody can tell.
        """
        answer = ask(["squeue", "--me", "--noheader", f"--name={self._orders.name}", "--format=%i|%T"])
        if answer.status != 0:
            raise LaunchError(f"squeue: {answer.words}", returncode=answer.status)
        found = [line.strip().partition("|") for line in answer.out.splitlines()]
        return next((job for job, _, state in found if PHASES.get(state, "running") in {"waiting", "running"}), "")

    def poll(self) -> JobState:
        state = self._queued() or self._accounted() or self._remembered()
        now = time.monotonic()
        if state is not None:
            self._last, self._known_s = state, now
        elif now - self._known_s >= FORGOTTEN_AFTER_S:
            return JobState("lost", f"Slurm has not known job {self._job} for {FORGOTTEN_AFTER_S:g} s")
        return self._last

    def _queued(self) -> JobState | None:
        answer = ask(["squeue", "--noheader", f"--jobs={self._job}", "--format=%T|%r"])
        if answer.status != 0:
            if "Invalid job id" not in answer.err:
                self._known_s = time.monotonic()  # the controller is away, which says nothing of the job
            return None
        name, _, reason = answer.out.strip().partition("|")
        phase = PHASES.get(name)
        if phase not in {"waiting", "running"}:
            return None  # ended, and how is in the accounts
        return JobState(phase, reason if phase == "waiting" and reason != "None" else "")

    def _accounted(self) -> JobState | None:
        asked = [
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            f"--jobs={self._job}",
            "--format=State,ExitCode",
        ]
        answer = ask(asked)
        lines = answer.out.strip().splitlines()
        if answer.status != 0 or not lines:
            return None
        name, _, status = lines[-1].partition("|")
        state = _state(name, status)
        return state if state is not None and state.has_ended else None

    def _remembered(self) -> JobState | None:
        """What the controller still knows of a job that has ended, where no accounts are kept."""
        answer = ask(["scontrol", "show", "job", self._job, "--oneliner"])
        fields = dict(word.partition("=")[::2] for word in answer.out.split())
        if answer.status != 0 or "JobState" not in fields:
            return None
        return _state(fields["JobState"], fields.get("ExitCode", ""))

    def ask_to_end(self) -> None:
        if self._last.phase == "waiting":
            self.end()
        else:  # to the tasks alone, so that the script waits for them
            ask(["scancel", "--signal=TERM", self._job])

    def end(self) -> None:
        ask(["scancel", self._job])

    def logs(self) -> list[Path]:
        of_slurm = self._orders.folder / f"slurm-{self._job}.log"
        folder = self.folder()
        of_nodes = sorted(folder.glob("node-*.log")) if folder is not None else []
        return [*([of_slurm] if of_slurm.exists() else []), *of_nodes]

    def folder(self) -> Path | None:
        starts = [path for path in self._orders.folder.glob(f"start-{self._job}.*") if path.is_dir()]
        return max(starts, key=lambda path: int(path.name.rpartition(".")[2]), default=None)


def _state(name: str, exit_code: str) -> JobState | None:
    """`FAILED` and `75:0`, `CANCELLED by 1000` and `0:15`: exit status, and the signal that ended the script."""
    phase = PHASES.get(name.split()[0] if name.split() else "")
    if phase is None:
        return None
    status, _, number = exit_code.partition(":")
    code = int(status) if status.isdigit() else 0
    code = 128 + int(number) if number.isdigit() and int(number) else code
    if phase == "failed" and code == EXIT_RESUME:
        phase = "stopped"
    return JobState(phase, f"Slurm: {name}", code)
