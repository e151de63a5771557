"""Runs of one name take turns, in real processes: neither touches the folder of the other's logs and errors."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mcore.artifacts import Store
from tests.unit.tasks import named_run
from tests.unit.tasks.model_folders import write_workspace

WAITS = "another run named {} is under way; waiting for it"
MAKE = "print('made by', {name!r})\n(out / 'weights').write_text('weights')"
MAKE_WHEN_TOLD = (
    "print('started', flush=True)\nwhile not (out.parent.parent / 'go').exists():\n    time.sleep(0.05)\n"
    + MAKE.format(name="first")
)

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path, prefect_api_url: str) -> Iterator[Start]:
    """Start a Python process in the test's folder; its log is `NAME.log` there."""
    started = []

    def run(name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=tmp_path,
                env={**os.environ, "PREFECT_API_URL": prefect_api_url},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for(text: str, file: Path) -> None:
    deadline = time.monotonic() + 90
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline, file.read_text() if file.exists() else f"no {file}"
        time.sleep(0.1)


@pytest.mark.parametrize("ending", ["done", "killed"])
def test_a_second_run_of_the_name_waits_for_the_end_of_the_first(tmp_path: Path, start: Start, ending: str) -> None:
    store = tmp_path / "store"
    log = store / "runs" / "named" / "work" / "stage.log"
    first = start("first", named_run.__file__, str(store), "a" * 20, MAKE_WHEN_TOLD)
    wait_for("\nstarted", log)
    second = start("second", named_run.__file__, str(store), "b" * 20, MAKE.format(name="second"))
    wait_for(WAITS.format("named"), tmp_path / "second.log")
    time.sleep(0.5)
    assert second.poll() is None and "\nstarted" in log.read_text() and not (store / "work").exists()
    if ending == "done":
        (store / "go").touch()
        assert first.wait(60) == 0
    else:
        first.send_signal(signal.SIGKILL)
    assert second.wait(60) == 0, (tmp_path / "second.log").read_text()
    assert "made by second" in log.read_text() and "started" not in log.read_text()
    made = {path.name[0] for path in (store / "work").iterdir()}
    assert made == ({"a", "b"} if ending == "done" else {"b"})


def test_every_flow_waits_for_its_name(tmp_path: Path, start: Start) -> None:
    write_workspace(tmp_path)
    flows = ("pipeline", "convert_only", "evaluate_only")
    with Store(tmp_path / "store").lock("run", "small"):
        for name in flows:
            code = (
                "import yaml\nfrom pathlib import Path\nfrom configs.schema.run import RunConfig\n"
                f"from flows.{name} import {name}\n"
                f"{name}(RunConfig.model_validate(yaml.safe_load(Path('run.yaml').read_text())))\n"
            )
            start(name, "-c", code)
        for name in flows:
            wait_for(WAITS.format("small"), tmp_path / f"{name}.log")
        time.sleep(0.5)
        assert not (tmp_path / "store" / "runs").exists() and not (tmp_path / "store" / ".partial").exists()
