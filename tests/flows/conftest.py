"""One run of the whole line, real from end to end, that the tests of this folder share."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.flows import run_pipeline
from tests.flows.prefect_server import Server, running_server
from tests.flows.workspace import make_workspace, raw_run


@dataclass(frozen=True)
class Workspace:
    """A folder with a model, rows, a suite and a store, in which runs can be started."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def run(self, raw_run: dict[str, Any]) -> dict[str, Any]:
        """Run the pipeline in a fresh process on Prefect's embedded server; what it came to."""
        run_file = self.folder / "run.json"
        run_file.write_text(json.dumps(raw_run))
        environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        environment["PREFECT_HOME"] = str(self.folder / "prefect")
        command = [sys.executable, run_pipeline.__file__, run_file.name]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(done.stdout)

    def weight_files(self) -> dict[str, tuple[int, int, int]]:
        """Inode and times of every file that an artifact holds: says whether any was touched.

        Leases and the like, whose folders begin with a dot, change all the time.
        """
        files = [path for path in self.store.glob("[!.]*/*/**/*") if path.is_file() and "runs" not in path.parts]
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in files}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("pipeline")
    make_workspace(folder)
    return Workspace(folder)


@pytest.fixture(scope="session")
def finished(workspace) -> dict[str, Any]:
    """What the first run in the workspace came to."""
    return workspace.run(raw_run())


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """A Prefect server with a worker, one for each file of tests."""
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def elsewhere(workspace, finished):
    """A run with absolute paths: the worker does not work in the workspace."""

    def run(**groups: Any) -> dict[str, Any]:
        folder = workspace.folder
        groups = {
            "evaluate": None,
            "model": {"source": str(folder / "model")},
            "data": {"dataset": [f"{folder}/rows.jsonl#64"], "val_dataset": [f"{folder}/rows.jsonl"]},
        } | groups
        return raw_run(**groups) | {"launch": raw_run()["launch"] | {"store": str(workspace.store)}}

    return run
