"""The flows and the command line.

Whoever imports a flow starts Prefect with it, so what its embedded server must be told is said here, before Prefect is
imported and reads its settings: no telemetry, and time enough to start on a busy machine.
"""

import os

from mcore.child import QUIET_ENVIRONMENT

os.environ.update(QUIET_ENVIRONMENT)
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # Prefect's own 20 s are tight
