"""Start or attach: of all runs that want the same artifact one makes it, and the others follow that one to its end.

What the second run then does is up to the first: its artifact is reused, and if it failed or was lost, the second goes
on itself. If the first is lost and its command is not, the second takes the command over, and the duty to end it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.runtime import flow_run

from mcore.attach import end_work_of
from mcore.launch import LineSampler, tail_of
from mcore.leases import Lease, describe
from mcore.supervise.claims import Claim
from tasks.graph import StagePlan
from tasks.watch import Watch, watched

if TYPE_CHECKING:
    from tasks.stage import PlannedRun

LOG = "stage.log"
LAST_LINES = 5
"""Lines that a log which is followed begins with."""


@contextmanager
def start_or_attach(planned: PlannedRun, plan: StagePlan, say: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the right to make a stage's artifact for the block; while another run has it, show how far that is.

    Raises:
        Abort: The flow run was cancelled or deleted while it waited.
    """
    with ExitStack() as held:
        with watched() as watch:
            follower = _Follower(plan, say, watch)
            lease = held.enter_context(
                planned.store.lock(
                    plan.kind, plan.key, run=planned.run.name, flow_run=str(flow_run.id or ""),
                    log_folder=planned.stage_dir(plan.name), on_wait=follower.look,
                )
            )  # fmt: skip
        follower.tell_end(lease)
        if lease.adopted is not None:
            # What is not taken over by a command of this run, as it needs none or fails before, must not go on alone.
            held.callback(_end_what_nobody_took, lease)
        yield lease


def _end_what_nobody_took(lease: Lease) -> None:
    if lease.adopted is not None:
        end_work_of(lease, lease.adopted)


class _Follower:
    """Hands on the lines of the log of whoever is waited for."""

    def __init__(self, plan: StagePlan, say: Callable[[str], None], watch: Watch | None) -> None:
        self._plan = plan
        self._say = say
        self._watch = watch
        self._claim: Claim | None = None
        self._sampler: LineSampler | None = None

    def look(self, claim: Claim) -> None:
        """Called again and again while `claim` holds what is waited for."""
        if self._watch is not None:
            self._watch.check()
        if self._claim is None or self._claim.token != claim.token:
            self._claim, self._sampler = claim, None
            self._say(f"{describe(claim)} is making {self._plan.artifact}; waiting for it")
        log = Path(claim.folder) / LOG if claim.folder else None
        try:
            if self._sampler is None and log is not None and log.is_file():
                self._say(f"following {log}")
                self._sampler = LineSampler(log, _begin_of_last_lines(log), self._say)
            if self._sampler is not None:
                self._sampler.read()
        except FileNotFoundError:
            self._sampler = None  # a stage without a word takes its log away

    def tell_end(self, lease: Lease) -> None:
        """Say how it ended with whom we waited for, or who was lost before we came."""
        before = lease.before
        if before is None or (before.is_free and not before.told):
            return
        if not before.is_free:
            self._say(f"{describe(before)} was lost at {self._plan.artifact}; going on with it here")
        elif self._claim is not None:
            self._say(f"{describe(before)} failed at {self._plan.artifact} ({before.told}); going on with it here")


def _begin_of_last_lines(log: Path) -> int:
    """Where the last lines of a log begin, in bytes."""
    size = log.stat().st_size
    last = tail_of(log).splitlines()[-LAST_LINES:]
    return max(0, size - len("\n".join([*last, ""]).encode()))
