"""One run of a name at a time: a second one, whatever its settings, waits until the first is through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect import get_run_logger

from mcore.errors import ArtifactError
from tasks.record import recorded
from tasks.stage import PlannedRun


@contextmanager
def alone(planned: PlannedRun) -> Iterator[None]:
    """Hold the run's name for the block, as logs, errors and the report of a run are in a folder of that name.

    The system frees the name when its holder dies, so nobody waits for a run that was killed. The run is on record from
    the moment that it has the name.
    """
    name, store = planned.run.name, planned.store
    with ExitStack() as held:
        try:
            held.enter_context(store.lock("run", name, timeout_s=0))
        except ArtifactError:
            get_run_logger().info("another run named %s is under way; waiting for it", name)
            held.enter_context(store.lock("run", name))
        held.enter_context(recorded(planned))
        yield
