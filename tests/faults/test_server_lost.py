"""kill -9 of Prefect's server while a worker's run is under way: the run goes on, and ends as if there had been one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.disturbed import Disturbed, ended_at, is_at, told, wait_until
from tests.faults.server_runs import RUN, absolute, state_once_ended
from tests.flows.prefect_server import PREFECT, Server, running_server

pytestmark = [pytest.mark.faults, pytest.mark.endurance, pytest.mark.server, pytest.mark.timeout(1500)]


class MortalServer:
    """A server with a worker, of which the server can be killed and started again where it was."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def kill(self) -> None:
        """kill -9 of the server and of all that came of it."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            with suppress(psutil.Error):
                is_ours = process.environ().get("PREFECT_HOME") == str(self._folder)
                if is_ours and ("server" in words or "prefect.server.api.server:create_app" in words):
                    process.kill()

    def start(self) -> None:
        """Start it again, with the same database on the same port."""
        port = str(self.server.client.base_url.port)
        with (self._folder / "server-again.log").open("a") as log:
            self._started.append(
                subprocess.Popen(
                    [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port],
                    cwd=self._folder, env=self.server.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip
        wait_until(self.answers, "the server did not come back")

    def answers(self) -> bool:
        with suppress(httpx.TransportError):
            return self.server.client.get("/health").is_success
        return False

    def close(self) -> None:
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MortalServer]:
    folder = tmp_path_factory.mktemp("server")
    with running_server(folder) as server:
        mortal = MortalServer(server, folder)
        yield mortal
        mortal.close()


@pytest.mark.parametrize("seconds", [3, 45])
def test_a_server_that_is_away_for_a_while_is_not_missed(
    mortal: MortalServer, workspace: Path, undisturbed: Undisturbed, seconds: int
) -> None:
    expected = undisturbed(RUN).exported()
    name = f"away-{seconds}"
    run = Disturbed(workspace, name, absolute(workspace, RUN, name), api_url=mortal.server.url)
    flow_run = mortal.server.start_run(run.run)
    wait_until(lambda: is_at(run.store.root, 25), "training does not begin", 300)
    mortal.kill()
    assert not mortal.answers()
    time.sleep(seconds)
    mortal.start()
    assert state_once_ended(mortal.server, flow_run) == "Completed"
    assert run.exported() == expected
    assert ended_at(told(run.store, name)) == ("done", "")
    run.finish(expected)


def test_a_server_that_is_away_at_the_end_costs_nothing_but_its_view(
    mortal: MortalServer, workspace: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed(RUN).exported()
    name = "away-at-the-end"
    run = Disturbed(workspace, name, absolute(workspace, RUN, name), api_url=mortal.server.url)
    flow_run = mortal.server.start_run(run.run)
    wait_until(lambda: any(run.store.root.glob("export/*/manifest.json")), "no export", 300)
    pid = told(run.store, name)["pid"]
    mortal.kill()
    # The run's own record says how it ended, whatever Prefect's client makes of it.
    wait_until(lambda: not psutil.pid_exists(pid), "the flow's process stays", 400)
    assert run.exported() == expected
    assert ended_at(told(run.store, name)) == ("done", "")
    mortal.start()
    print(f"{name}: {mortal.server.state(flow_run)} on the server")
    run.finish(expected)
