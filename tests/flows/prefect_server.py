"""A real Prefect server with a real worker, for tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.flows.workspace import CHECKOUT

PREFECT = Path(sys.executable).with_name("prefect")


@dataclass(frozen=True)
class Server:
    """A Prefect server with a worker, and a client for both."""

    environment: dict[str, str]
    client: httpx.Client

    @property
    def url(self) -> str:
        """Its API."""
        return self.environment["PREFECT_API_URL"]

    def prefect(self, *arguments: str) -> str:
        """Output of a `prefect` command, run in the checkout."""
        done = subprocess.run(
            [PREFECT, "--no-prompt", *arguments], cwd=CHECKOUT, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def mcore_flows(self, *arguments: str | Path) -> str:
        """Output of a command of ours, run in the checkout."""
        command = [PREFECT.with_name("mcore-flows"), *arguments]
        done = subprocess.run(command, cwd=CHECKOUT, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def filter(self, kind: str, **filters: Any) -> list[dict[str, Any]]:
        """Objects of a kind, such as `task_runs`."""
        answer = self.client.post(f"/{kind}/filter", json=filters)
        answer.raise_for_status()
        return answer.json()

    def start_run(self, run: dict[str, Any], deployment: str = "pipeline/pipeline") -> str:
        """Start a deployment with another run than its own. Returns the flow run's id."""
        name = deployment.partition("/")[2]
        before = self.flow_runs(name).keys()
        self.prefect("deployment", "run", deployment, "--params", json.dumps({"run": run}))
        found = self.flow_runs(name)
        (new,) = (flow_run for flow_run in found.keys() - before if not found[flow_run]["auto_scheduled"])
        return new

    def flow_runs(self, deployment: str) -> dict[str, dict[str, Any]]:
        """Flow runs of a deployment by their ids."""
        found = self.filter("flow_runs", deployments={"name": {"any_": [deployment]}})
        return {flow_run["id"]: flow_run for flow_run in found}

    def state(self, flow_run_id: str) -> str:
        """Name of a flow run's state."""
        return self.flow_run(flow_run_id)["state_name"]

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        """A flow run as the server tells it."""
        answer = self.client.get(f"/flow_runs/{flow_run_id}")
        answer.raise_for_status()
        return answer.json()


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


@contextmanager
def background(command: list[str | Path], log: Path, environment: dict[str, str], cwd: Path) -> Iterator[None]:
    """A process of its own session that is gone behind the block."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def running_server(folder: Path, **variables: str) -> Iterator[Server]:
    """A server on a free port of this machine that knows what `mcore-flows bootstrap` makes, and a worker.

    Args:
        folder: Where both work and log; `server.log` and `worker.log` in it tell what went wrong.
        variables: Further environment variables of both.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": url,
        "PREFECT_UI_API_URL": url,
        **variables,
    }
    start = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        background(start, folder / "server.log", environment, folder),
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        running = Server(environment, client)

        def answers() -> bool:
            try:
                return client.get("/health").is_success
            except httpx.TransportError:
                return False

        wait_until(answers, 120)
        running.mcore_flows("bootstrap")
        # Started elsewhere on purpose: the pull step has to find the checkout.
        worker = [PREFECT, "worker", "start", "--pool", "mcore-flows"]
        with background(worker, folder / "worker.log", environment, folder):
            yield running
