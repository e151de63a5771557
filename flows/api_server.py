"""The Prefect server that commands talk to: one that is named, and that answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import get_current_settings

from flows.console import check_server
from mcore.errors import ConfigError, Problem

DEFAULT = "http://127.0.0.1:4200/api"


@contextmanager
def server_client() -> Iterator[SyncPrefectClient]:
    """A client of the server that PREFECT_API_URL or the profile names. None is started for this: it would be gone
    behind the command, with all that it was told.

    Raises:
        ConfigError: None is named, or it does not answer.
    """
    url = get_current_settings().api.url
    if url is None:
        fix = f"Start one (prefect server start) and name it: export PREFECT_API_URL={DEFAULT}."
        raise ConfigError("no Prefect server", [Problem("PREFECT_API_URL", "the API of a server", "none", fix)])
    check_server(url)
    with get_client(sync_client=True) as client:
        yield client
