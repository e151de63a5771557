"""The record of a run in the store, around its stages: what it is to do when it starts, how it went when it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from prefect import get_run_logger
from prefect.exceptions import Pause
from prefect.runtime import flow_run

from mcore.errors import GateError, StoppedError
from mcore.runs import Failure, RunRecord, StageRecord, State, begin, end, now
from tasks.stage import PlannedRun


@contextmanager
def recorded(planned: PlannedRun) -> Iterator[None]:
    """Keep a record of the run for the block, which holds the run's name.

    That the run starts must be on record, or what it needs could be collected. How it ended is only told: if that can't
    be written, the run has ended all the same.
    """
    record = RunRecord(
        name=planned.run.name,
        flow=flow_run.flow_name or "",
        config=planned.run.model_dump(mode="json"),
        stages=tuple(StageRecord(plan.name, plan.kind, plan.key, plan.inputs) for plan in planned.plans.values()),
        folder=str(Path.cwd()),
        pid=os.getpid(),
        started=now(),
    )
    begin(planned.store, record)
    try:
        yield
    except BaseException as exc:
        _end(planned, record, exc)
        raise
    _end(planned, record)


def _end(planned: PlannedRun, record: RunRecord, error: BaseException | None = None) -> None:
    outcomes = {
        outcome.name: {"cached": outcome.cached, "seconds": round(outcome.seconds, 3)} for outcome in planned.outcomes
    }
    failure = None
    if error is not None:
        plan = next((plan for plan in planned.plans.values() if plan.name not in outcomes), None)
        summary = str(getattr(error, "summary", error)).partition("\n")[0]
        failure = Failure(
            None if plan is None else plan.name, None if plan is None else plan.artifact, type(error).__name__, summary
        )
    ended = replace(record, ended=now(), state=_state(error), outcomes=outcomes, failure=failure)
    try:
        end(planned.store, ended)
    except OSError as exc:
        get_run_logger().warning("how the run ended can't be recorded: %s", exc)
    try:
        from tasks.run_page.page import write_page  # Jinja, which nothing needs before

        write_page(planned.store, ended)
    except Exception as exc:  # it neither fails a run nor hides what failed it
        get_run_logger().warning("the page of the run can't be written: %s", f"{type(exc).__name__}: {exc}")


def _state(error: BaseException | None) -> State:
    if error is None:
        return "done"
    if isinstance(error, GateError):
        return "rejected"
    if isinstance(error, StoppedError | KeyboardInterrupt | Pause):  # Pause: it waits for an answer, and then goes on
        return "stopped"
    return "failed" if isinstance(error, Exception) else "cancelled"  # Prefect's own signal is no error
