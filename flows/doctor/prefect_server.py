"""Prefect: the server, what it has for us, and the settings that would break a long run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import prefect
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from flows.doctor.finding import Finding, judged
from mcore.wording import counted

POOL, LIMIT = "mcore-flows", "gpu"
MIN_RETRIES = 10
"""With the default of 5 a run gives up 71 s after its server went away, and stays Running for ever."""
MEMORY_LEASES = "prefect.server.concurrency.lease_storage.memory"
FILE_LEASES = "prefect.server.concurrency.lease_storage.filesystem"
BOOTSTRAP = "Run `mcore-flows bootstrap`."


def prefect_findings() -> Iterator[Finding]:
    """What holds for the server that PREFECT_API_URL names, and for this environment's settings."""
    yield from _client_settings()
    url = get_current_settings().api.url
    if url is None:
        fix = "Start one (prefect server start) and export PREFECT_API_URL, for a UI, schedules and workers."
        yield Finding("server", "warn", "none is named: each run brings its own", fix)
        return
    with get_client(sync_client=True) as client:
        failed = client.api_healthcheck()
        if failed is not None:
            fix = "Start it, or unset PREFECT_API_URL to run without."
            yield Finding("server", "fail", f"{url} does not answer ({type(failed).__name__})", fix)
            return
        version = client.api_version()
        fix = f"Use one version on both sides: this is {prefect.__version__}."
        yield judged("server", version == prefect.__version__, f"{url}, Prefect {version}", fix, otherwise="warn")
        yield from _server_settings(client)
        yield from _what_it_has(client)


def _client_settings() -> Iterator[Finding]:
    settings = get_current_settings()
    retries = settings.client.max_retries
    yield judged("PREFECT_CLIENT_MAX_RETRIES", retries >= MIN_RETRIES, str(retries),
                 f"Set it to {MIN_RETRIES}: a run whose server is away at its end is Running for ever, else.",
                 otherwise="warn")  # fmt: skip
    persists = bool(settings.results.persist_by_default)
    fix = "Unset it: results are written neither whole nor at once on a full disk, and nothing here reads them."
    yield judged("PREFECT_RESULTS_PERSIST_BY_DEFAULT", not persists, str(persists).lower(), fix, otherwise="warn")
    beat = settings.flows.heartbeat_frequency
    fix = "Set PREFECT_FLOWS_HEARTBEAT_FREQUENCY, such as 60: runs that were killed are not found without."
    yield judged("heartbeat of flows", beat is not None, f"every {beat} s" if beat else "none", fix, otherwise="warn")


def _server_settings(client: SyncPrefectClient) -> Iterator[Finding]:
    answer = client.request("GET", "/admin/settings")
    if answer.status_code != 200:
        yield Finding("settings of the server", "warn", f"not told (status {answer.status_code})")
        return
    server: dict[str, Any] = answer.json()["server"]
    leases = server["concurrency"]["lease_storage"]
    fix = f"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={FILE_LEASES}: a restart forgets who has GPUs, else."
    yield judged("leases of the server", leases != MEMORY_LEASES, leases.rpartition(".")[2], fix, otherwise="warn")
    vacuum = server["services"]["db_vacuum"]["enabled"]
    cleans = vacuum is True or (isinstance(vacuum, list) and "flow_runs" in vacuum)
    fix = 'PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED=\'["events","flow_runs"]\': the database grows for ever, else.'
    found = ", ".join(sorted(vacuum)) if isinstance(vacuum, list) else str(vacuum).lower()
    yield judged("clean-up of the server", cleans, found or "none", fix, otherwise="warn")
    host = server["api"]["host"]
    fix = "Anybody who reaches it may start runs here: listen on 127.0.0.1, or put a proxy that asks who it is before."
    yield judged("address of the server", host in {"127.0.0.1", "localhost", "::1"}, host, fix, otherwise="warn")
    tells = bool(server["analytics_enabled"])
    fix = "PREFECT_SERVER_ANALYTICS_ENABLED=false."
    yield judged("analytics of the server", not tells, "sent to Prefect" if tells else "off", fix, otherwise="warn")


def _what_it_has(client: SyncPrefectClient) -> Iterator[Finding]:
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        yield Finding(f"work pool {POOL}", "warn", "none", BOOTSTRAP)
    else:
        workers = client.read_workers_for_work_pool(POOL)
        online = sum(worker.status == "ONLINE" for worker in workers)
        state = f"{pool.type}, {counted(online, 'worker')} online{', paused' if pool.is_paused else ''}"
        fix = f"prefect worker start --pool {POOL}" if not online else f"prefect work-pool resume {POOL}"
        yield judged(f"work pool {POOL}", online > 0 and not pool.is_paused, state, f"{fix}.", otherwise="warn")
    try:
        limit = client.read_global_concurrency_limit_by_name(LIMIT)
    except ObjectNotFound:
        yield Finding(f"limit {LIMIT}", "warn", "none", BOOTSTRAP)
    else:
        found = f"{limit.active_slots} of {limit.limit} slots taken"
        yield judged(f"limit {LIMIT}", limit.active, found, "It is switched off: prefect gcl update gpu --enable.",
                     otherwise="warn")  # fmt: skip
    deployments = client.read_deployments()
    found = counted(len(deployments), "deployment")
    yield judged("deployments", bool(deployments), found, BOOTSTRAP, otherwise="warn")
