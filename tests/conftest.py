"""Fixtures that several folders of tests share."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from mcore.child import QUIET_ENVIRONMENT

os.environ.update(QUIET_ENVIRONMENT)
# Whoever starts the tests in the background may have Ctrl-C ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def prefect_api_url():
    """A real Prefect server with a database of its own, one for the whole session."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with ExitStack() as stack:
        for attempt in range(3):
            try:
                stack.enter_context(prefect_test_harness(server_startup_timeout=120))
                break
            except (httpx.TransportError, RuntimeError):  # its port was taken while it started
                if attempt == 2:
                    raise
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, got and dequantised by the project's own stage."""
    folder = tmp_path_factory.mktemp("sources") / "smollm2"
    command = [sys.executable, "-m", "mcore.sources", "fetch", "smollm2-135m-instruct", "--output", str(folder)]
    subprocess.run(command, check=True)
    return folder
