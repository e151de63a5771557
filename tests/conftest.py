"""Fixtures that several folders of tests share."""

import os

import pytest

from mcore.child import QUIET_ENVIRONMENT

os.environ.update(QUIET_ENVIRONMENT)


@pytest.fixture(scope="session")
def prefect_api_url():
    """A real Prefect server with a database of its own, one for the whole session."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()
