"""A run that needs what another one is making says so, shows how far that is, and goes on itself if that one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.tasks import toy_flow

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("prefect_api_url")]

CODE = """
print("attempt", count, flush=True)
if count == 1:
    while not os.path.exists(os.path.normpath(os.path.join(out, "..", "..", "go"))):
        time.sleep(0.05)
    raise SystemExit(1)
make()
"""


def test_the_second_run_follows_the_first_and_is_told_of_its_failure(tmp_path: Path, prefect_api_url: str) -> None:
    store = tmp_path / "store"
    (store / ".partial").mkdir(parents=True)
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    started: list[subprocess.Popen[bytes]] = []

    def start(log: Path) -> None:
        with log.open("w") as file:
            started.append(
                subprocess.Popen(
                    [sys.executable, toy_flow.__file__, str(store), CODE],
                    env={**os.environ, "PREFECT_API_URL": prefect_api_url}, stdout=file, stderr=file,
                )
            )  # fmt: skip

    def wait_for(text: str, log: Path) -> None:
        deadline = time.monotonic() + 60
        while text not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    try:
        start(logs[0])
        wait_for("attempt 1", logs[0])
        start(logs[1])
        wait_for("attempt 1", logs[1])
        told = logs[1].read_text()
        assert f"run toys (process {started[0].pid} on " in told and "is making toy/" in told
        (store / "go").touch()
        assert started[0].wait(60) != 0 and started[1].wait(60) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
    told = logs[1].read_text()
    assert "failed at toy/" in told and "(LaunchError: " in told and "going on with it here" in told
    assert told.rstrip().endswith("cached=False") and (store.parent / "executions").read_text() == "xx"
