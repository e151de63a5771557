"""Flows start a Prefect that tells nobody about it, and that nobody can ask from another machine."""

import os
import subprocess
import sys

from mcore.child import QUIET_ENVIRONMENT

CODE = """
import flows.pipeline
from prefect.settings import get_current_settings
settings = get_current_settings()
assert settings.server.analytics_enabled is False
assert settings.server.ephemeral.startup_timeout_seconds == 120
assert settings.server.api.host == "127.0.0.1"
"""


def test_a_flow_that_is_imported_alone_starts_no_telemetry(tmp_path):
    left_out = {*QUIET_ENVIRONMENT, "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["PREFECT_HOME"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
