"""Prefect's embedded server ends with the process that started it, also if that one is killed.

Prefect stops the server when its process ends well; after a kill -9 it stays, with 200 MB, for ever. So a watcher of a
few MB stands by: `python -I tasks/embedded_server.py SERVER PARENT` ends the server when its own parent is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SERVER = "prefect.server.api.server"
POLL_S = 0.5


def end_server_with_this_process() -> None:
    """Start a watcher for the embedded server, if this process has one."""
    from mcore.supervise import descendants  # not at the top: the watcher runs without site packages

    for pid in filter(_is_server, descendants(os.getpid())):
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(pid), str(os.getpid())],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def _is_server(pid: int) -> bool:
    try:
        return SERVER in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False  # it ended


def watch(server: int, parent: int) -> None:
    """End the server when its process is gone; leave when the server is."""
    while os.getppid() == parent and _is_server(server):
        time.sleep(POLL_S)
    if _is_server(server):
        os.kill(server, signal.SIGTERM)


if __name__ == "__main__":
    watch(int(sys.argv[1]), int(sys.argv[2]))
