"""One run of a name at a time: a second one, whatever its settings, waits until the first is through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger
from prefect.runtime import flow_run

from mcore.supervise.claims import Claim
from tasks.record import recorded
from tasks.stage import PlannedRun


@contextmanager
def alone(planned: PlannedRun) -> Iterator[None]:
    """Hold the run's name for the block, as logs, errors and the report of a run are in a folder of that name.

    The name is a lease, which no dead process keeps, so nobody waits for a run that was killed. The run is on record
    from the moment that it has the name.
    """
    name, logger = planned.run.name, get_run_logger()
    told: list[int] = []

    def tell(claim: Claim) -> None:
        if claim.token not in told:
            told.append(claim.token)
            logger.info("another run named %s is under way; waiting for it", name)

    lease = planned.store.lock("run", name, run=name, flow_run=str(flow_run.id or ""), on_wait=tell)
    with lease, recorded(planned):
        yield
