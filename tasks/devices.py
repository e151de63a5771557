"""The devices of a stage: a lease on this machine, and slots of the whole deployment where a server counts them.

The lease (`mcore/devices`) is what keeps two stages off the same GPU. The server's limit `gpu` only says how many GPUs
all workers together may use; it is for deployments, and without it, or without a server that lives, nothing is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run

from mcore.devices import Request
from mcore.errors import ConfigError, Problem

LIMIT = "gpu"
"""Name of the limit that counts GPUs (`prefect gcl create gpu --limit N`)."""
LEASE_S = 60.0
"""Seconds after which the server takes back the slots of a run that is gone: the shortest that it allows."""
LISTEN_EVERY_S = 10.0
"""Seconds of waiting for slots between two looks at whether the run was cancelled meanwhile."""


@contextmanager
def deployment_slots(request: Request, say: Callable[[str], None], check: Callable[[], None]) -> Iterator[None]:
    """Hold slots of the limit `gpu` for the block, if this is a run of a deployment and its server has that limit.

    Args:
        request: The devices; a machine that has none to count takes no slots.
        say: Takes a line for the flow's log.
        check: Called now and then while it waits; what it raises ends that.

    Raises:
        ConfigError: The limit is lower than what is asked for, so nobody would ever get it.
    """
    count = request.count
    limit = _limit(say) if deployment.id is not None and request.candidates() else None
    if limit is None:
        yield
        return
    if limit.limit < count:
        fix = f"Raise it (prefect gcl update {LIMIT} --limit {count}), or use fewer processes."
        raise ConfigError(
            "the run can never get its GPUs",
            [Problem(f"limit {LIMIT} of the Prefect server", f"at least {count}", str(limit.limit), fix)],
        )
    if limit.active_slots + count > limit.limit:
        say(f"waiting for {count} of {limit.limit} slots of the server's limit {LIMIT}: {limit.active_slots} are taken")
    holder = ConcurrencyLeaseHolder(type="flow_run", id=UUID(str(flow_run.id)))
    while True:
        # Not strict: a server that was away for a while must not end a training that goes on.
        held = concurrency(
            LIMIT, occupy=count, timeout_seconds=LISTEN_EVERY_S, lease_duration=LEASE_S, strict=False, holder=holder
        )
        try:
            held.__enter__()
            break
        except TimeoutError:
            check()
    say(f"holds {count} slots of the server's limit {LIMIT}")
    try:
        yield
    finally:
        with suppress(Exception):  # a server that is away takes them back by itself
            held.__exit__(None, None, None)


def _limit(say: Callable[[str], None]) -> GlobalConcurrencyLimitResponse | None:
    """The server's limit; None if it has none, or does not answer."""
    try:
        with get_client(sync_client=True) as client:
            return client.read_global_concurrency_limit_by_name(LIMIT)
    except ObjectNotFound:
        return None
    except Exception as exc:  # whatever it is, devices are leased on this machine all the same
        say(f"the server's limit {LIMIT} is not known ({exc!r}); going on without it")
        return None
