"""A run that was cancelled or deleted ends its stage by itself, if nobody else tells it to.

A worker that was started again knows nothing of the runs of the one before, so a cancel reaches the server and nobody
else: the run would go on for days. So the state is asked for now and then, in a thread, as a server that is away must
not hold up the stage.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import Abort, ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled

POLL_S = 10.0
"""Seconds between two questions."""


class Watch:
    """Asks for the state of a flow run until it is stopped.

    Args:
        run_id: The flow run.
    """

    def __init__(self, run_id: UUID) -> None:
        self._run_id = run_id
        self._reason = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask_on, name="watch of the flow run", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See what the last answer was.

        Raises:
            Abort: The run was cancelled or deleted.
        """
        if self._reason:
            raise Abort(f"the flow run was {self._reason}")

    def stop(self) -> None:
        """Ask no more."""
        self._stop.set()

    def _ask_on(self) -> None:
        while not self._stop.wait(POLL_S) and not self._reason:
            with suppress(Exception):  # a server that is away tells nothing, and the stage goes on
                self._reason = self._ask()

    def _ask(self) -> str:
        with get_client(sync_client=True) as client:
            try:
                state = client.read_flow_run(self._run_id).state
            except ObjectNotFound:
                return "deleted"
        ended = state is not None and state.type in {StateType.CANCELLING, StateType.CANCELLED}
        return "cancelled" if ended else ""


@contextmanager
def watched() -> Iterator[Watch | None]:
    """Watch the flow run that this is called in, if it is called in one.

    If the block ends because the run was cancelled, the run's state is made Cancelled, which nobody else would do.
    """
    run_id = flow_run.id
    if run_id is None:
        yield None
        return
    watch = Watch(UUID(str(run_id)))
    try:
        yield watch
    except Abort as abort:
        state: State[Any] = Cancelled(message=str(abort))
        with suppress(Exception), get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(str(run_id)), state, force=True)
        abort.state = state  # type: ignore[attr-defined]  # Prefect's flow engine takes it from there
        raise
    finally:
        watch.stop()
