"""A local `vllm serve` for as long as somebody talks to it, on the loopback and for nobody else."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

from mcore.child import QUIET_ENVIRONMENT
from mcore.errors import ConfigError, InfrastructureError, Problem
from mcore.supervise.processes import PR_SET_PDEATHSIG, prctl

HOST = "127.0.0.1"
END_S = 15.0
"""Seconds that the server has to end by itself."""
POLL_S = 0.2
TAIL_LINES = 20

ENVIRONMENT = QUIET_ENVIRONMENT | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_WAIT_POLICY": "passive",
}

OPENER = build_opener(ProxyHandler({}))
"""A proxy has no business between a program and its own machine."""


@contextmanager
def served(command: Sequence[str], *, start_s: float) -> Iterator[tuple[str, str]]:
    """Start a server for the block, and end it with all its processes however the block ends.

    Args:
        command: `vllm serve MODEL …` without address, port and key.
        start_s: Seconds that it has to come up.

    Yields:
        Its address (`http://127.0.0.1:PORT`), and the key that requests must show: others on this machine have none.

    Raises:
        ConfigError: There is no such program.
        InfrastructureError: It did not come up; with the end of its log.
    """
    port, key = _free_port(), secrets.token_urlsafe(24)
    url = f"http://{HOST}:{port}"
    # By the environment, since a command line can be read by everybody.
    environment = {**ENVIRONMENT, **os.environ, "VLLM_API_KEY": key}
    with tempfile.TemporaryDirectory(prefix="mcore-flows-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as written:
            try:
                process = subprocess.Popen(
                    [*command, "--host", HOST, "--port", str(port)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=written,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for the conversation
                    preexec_fn=_end_with_parent,
                )
            except OSError as exc:
                raise ConfigError("vLLM can't be started", [Problem(command[0], found=str(exc))]) from exc
        try:
            _wait(process, url, log, start_s)
            yield url, key
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, start_s: float) -> None:
    deadline = time.monotonic() + start_s
    while True:
        if process.poll() is not None:
            raise InfrastructureError("the server did not start", [_last_lines(log)])
        if time.monotonic() > deadline:
            raise InfrastructureError(f"the server did not answer within {start_s:g} s", [_last_lines(log)])
        with suppress(URLError, OSError), OPENER.open(f"{url}/health", timeout=5):
            return
        time.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, then SIGKILL to all that is left of its session."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_with_parent() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_lines(log: Path) -> Problem:
    lines = log.read_text(errors="replace").strip().splitlines()[-TAIL_LINES:]
    return Problem("the end of its log", found="\n".join(lines) or "nothing")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def request(url: str, key: str | None, body: bytes | None = None) -> Request:
    """A request to a server, with its key if it wants one."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    return Request(url, data=body, headers=headers)
