"""Prefect's embedded server does not outlive a flow that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mcore.supervise import descendants
from tasks.embedded_server import SERVER

pytestmark = pytest.mark.faults

FLOW = """
import time
from prefect import flow
from tasks.embedded_server import end_server_with_this_process

@flow
def waits():
    end_server_with_this_process()
    print("running", flush=True)
    time.sleep(600)

waits()
"""


def test_kill_9_of_a_flow_ends_its_server(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    flow = subprocess.Popen([sys.executable, "-c", FLOW], env=environment, stdout=subprocess.PIPE, text=True)
    assert flow.stdout.readline() == "running\n"
    started = descendants(flow.pid)
    servers = [pid for pid in started if SERVER in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(servers) >= 1 and len(started) > len(servers), "the watcher is there too"
    flow.send_signal(signal.SIGKILL)
    flow.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in started):
        assert time.monotonic() < deadline, "the server stayed"
        time.sleep(0.2)
